// The list of conversations.

import { $, element, iconButton } from "./dom.js";

export class Sidebar {
  // actions: open(id), rename(id, title), remove(id).
  constructor(actions) {
    this.actions = actions;
    this.list = $("#conversations");
  }

  render(heads, current) {
    this.list.replaceChildren(...heads.map((head) => this.item(head, head.id === current)));
    $("#no-conversations").hidden = heads.length > 0;
  }

  item(head, isCurrent) {
    const { actions } = this;
    const open = element(
      "button",
      {
        type: "button",
        className: "open",
        title: new Date(head.updated).toLocaleString(),
        "aria-current": isCurrent ? "true" : null,
        onclick: () => actions.open(head.id),
      },
      head.title,
    );
    const item = element(
      "li",
      { className: isCurrent ? "current" : "" },
      open,
      iconButton("edit", `Rename ${head.title}`, () => this.rename(head, item)),
      iconButton("trash", `Delete ${head.title}`, () => this.confirm(head, item)),
    );
    return item;
  }

  rename(head, item) {
    const input = element("input", { type: "text", value: head.title, maxLength: 200, "aria-label": "Title" });
    const form = element(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          finish();
        },
      },
      input,
    );
    let over = false;
    const finish = (keep = true) => {
      if (over) return;
      over = true;
      this.actions.rename(head.id, (keep && input.value.trim()) || head.title);
    };
    input.addEventListener("blur", () => finish());
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    item.replaceChildren(form);
    input.select();
  }

  confirm(head, item) {
    const remove = element(
      "button",
      { type: "button", className: "danger", onclick: () => this.actions.remove(head.id) },
      "Delete",
    );
    const keep = element(
      "button",
      { type: "button", onclick: () => item.replaceWith(this.item(head, item.classList.contains("current"))) },
      "Keep",
    );
    item.replaceChildren(element("span", { className: "faint" }, "Delete it?"), remove, keep);
    remove.focus();
  }
}
