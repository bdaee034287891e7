// The dialog that asks for an API key.

import { $ } from "./dom.js";

let open = null; // requests that are refused at the same time share the dialog

// Returns the key, or null if the reader gives none. wrong: why the last one was refused, or nothing.
export function askForKey(wrong) {
  $("#key-wrong").textContent = wrong;
  $("#key-wrong").hidden = !wrong;
  open ??= ask().finally(() => {
    open = null;
  });
  return open;
}

function ask() {
  const dialog = $("#key"),
    input = $("#key-value");
  input.value = "";
  return new Promise((resolve) => {
    const cancel = () => dialog.close("");
    $("#key-cancel").addEventListener("click", cancel);
    dialog.addEventListener(
      "close",
      () => {
        $("#key-cancel").removeEventListener("click", cancel);
        resolve(dialog.returnValue === "use" ? input.value.trim() : null);
      },
      { once: true },
    );
    dialog.returnValue = "";
    dialog.showModal();
  });
}
