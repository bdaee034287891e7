// The list of conversations.

import { $, button, element, form, iconButton, onKeys } from "./dom.js";

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
    const open = button(head.title, () => actions.open(head.id), {
      className: "open",
      title: new Date(head.updated).toLocaleString(),
      "aria-current": isCurrent ? "true" : null,
    });
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
    let over = false;
    const finish = (keep = true) => {
      if (over) return;
      over = true;
      this.actions.rename(head.id, (keep && input.value.trim()) || head.title);
    };
    input.addEventListener("blur", () => finish());
    onKeys(input, { escape: () => finish(false) });
    item.replaceChildren(form(() => finish(), {}, input));
    input.select();
  }

  confirm(head, item) {
    const remove = button("Delete", () => this.actions.remove(head.id), { className: "danger" });
    const keep = button("Keep", () => item.replaceWith(this.item(head, item.classList.contains("current"))));
    item.replaceChildren(element("span", { className: "faint" }, "Delete it?"), remove, keep);
    remove.focus();
  }
}
