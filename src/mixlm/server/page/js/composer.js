// Where a question is written.

import { $, onKeys } from "./dom.js";

export class Composer {
  // writer: send(text), stop(), isBusy().
  constructor(writer) {
    this.writer = writer;
    this.input = $("#prompt");
    this.input.addEventListener("input", () => this.grow());
    onKeys(this.input, { enter: () => this.submit() });
    $("#ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    $("#stop").addEventListener("click", () => writer.stop());
  }

  submit() {
    const text = this.input.value;
    if (this.writer.isBusy() || !text.trim()) return;
    this.input.value = "";
    this.grow();
    this.writer.send(text);
  }

  grow() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight + 2, innerHeight / 3)}px`;
  }

  // On a phone, the focus would bring up the keyboard.
  focus() {
    if (matchMedia("(hover: hover)").matches) this.input.focus({ preventScroll: true });
  }

  setBusy(busy) {
    $("#send").hidden = busy;
    $("#stop").hidden = !busy;
    document.body.setAttribute("aria-busy", busy);
  }
}
