// The conversation on the page: its turns, and pointing at tokens.

import { $, button, copyButton, element, form, iconButton, onKeys, percent } from "./dom.js";
import { card, inWords } from "./card.js";
import { CompletionView, colourOf } from "./completion.js";

const EXAMPLES = [
  ["Explain", "Explain in three sentences why the sky is blue."],
  ["Tell", "Tell a short story about a lighthouse keeper and a whale."],
  ["Write code", "Write a Python function that checks whether a word is a palindrome."],
];

export class Thread {
  // writer: what the buttons do, see writer.js. titleOf(completion): in words. refresh(): show everything anew.
  constructor(writer, { titleOf, refresh }) {
    Object.assign(this, { writer, titleOf, refresh });
    this.views = new Map(); // by completion id
    this.changed = new Set(); // ids of completions that are shown anew with the next frame
    this.frame = null;
    this.root = $("#thread");
    this.scroller = $("#scroller");
    this.listen();
  }

  render(conversation, view, model) {
    card.hide();
    this.view = view;
    this.views.clear();
    const { turns } = conversation;
    this.root.classList.toggle("empty", !turns.length);
    if (!turns.length) this.root.replaceChildren(this.welcome(model));
    else this.root.replaceChildren(...turns.map((turn) => this.turn(conversation, turn)));
  }

  // model: the one that will be asked; null if the server has none.
  welcome(model) {
    const members = model?.mixlm.members ?? [];
    const names = members.map(({ name }) => name);
    const sum = members.reduce((total, member) => total + member.weight, 0);
    const legend = element(
      "ul",
      { className: "legend", "aria-label": "Members" },
      ...members.map((member) =>
        element(
          "li",
          { className: `member ${colourOf(names, member.name)}` },
          `${member.name} ${percent(member.weight / sum)}`,
        ),
      ),
    );
    return element(
      "div",
      { className: "welcome" },
      element("h2", {}, "Several language models write one text"),
      element(
        "p",
        { className: "faint" },
        "Each token is sampled by one of them. Point at a token, or tap it, to see what else could have stood there. " +
          "Bold ones were unlikely.",
      ),
      legend,
      element(
        "div",
        { className: "examples" },
        ...EXAMPLES.map(([title, text]) =>
          button([element("b", {}, title), element("span", {}, text)], () => this.writer.send(text)),
        ),
      ),
      model ? null : element("p", { className: "error" }, "This server has no ensemble."),
    );
  }

  turn(conversation, { user, completions, chosen }) {
    const pair = completions.length > 1;
    const views = completions.map((completion, i) => {
      const view = new CompletionView(completion, {
        title: `${pair ? `${i ? "Right" : "Left"}: ` : ""}${this.titleOf(completion)}`,
        writer: this.writer,
        isChosen: i === chosen,
        isPaired: pair,
      });
      this.views.set(completion.id, view);
      view.render(this.view);
      view.root.dataset.completion = completion.id;
      return view.root;
    });
    return element(
      "section",
      { className: `turn${pair ? " pair" : ""}`, "aria-label": "A turn" },
      this.question(conversation, user),
      this.pager(user),
      element("div", { className: "completions" }, ...views),
    );
  }

  question(conversation, user) {
    const bubble = element("div", { className: "prompt" }, user.text);
    const buttons = element(
      "div",
      { className: "actions" },
      copyButton("Copy the question", () => user.text),
      iconButton("edit", "Edit and send again", () => this.edit(conversation, user, box)),
      this.pager(conversation.node(user.parent)),
    );
    const box = element("div", { className: "question" }, bubble, buttons);
    return box;
  }

  edit(conversation, user, box) {
    if (this.writer.isBusy()) return;
    const input = element("textarea", {
      value: user.text,
      rows: Math.min(12, user.text.split("\n").length + 1),
      "aria-label": "Edited question",
    });
    const cancel = () => this.refresh();
    const send = () => input.value.trim() && this.writer.edit(user, input.value);
    const buttons = element(
      "div",
      { className: "buttons" },
      button("Cancel", cancel),
      element("button", { type: "submit", className: "primary" }, "Send"),
    );
    onKeys(input, { enter: send, escape: cancel });
    box.replaceChildren(form(send, { className: "edit" }, input, buttons));
    input.focus();
  }

  // Which of several versions is shown; nothing where there is one.
  pager(parent) {
    const { slots, shown } = parent;
    if (slots.length < 2) return null;
    const go = (by) =>
      iconButton(
        by < 0 ? "left" : "right",
        by < 0 ? "Previous version" : "Next version",
        () => this.writer.show(parent, shown + by),
        { disabled: !slots[shown + by] },
      );
    return element("span", { className: "pager" }, go(-1), `${shown + 1} of ${slots.length}`, go(1));
  }

  // A completion has changed. It is shown with the next frame, with all that arrives until then.
  update(completion) {
    this.changed.add(completion.id);
    this.frame ??= requestAnimationFrame(() => this.showChanges());
  }

  // The page scrolls with what is new, unless the reader has scrolled up.
  showChanges() {
    this.frame = null;
    const follow = this.isAtEnd();
    for (const id of this.changed) this.views.get(id)?.update();
    this.changed.clear();
    if (follow) this.scrollToEnd();
  }

  isAtEnd() {
    return this.scroller.scrollTop + this.scroller.clientHeight > this.scroller.scrollHeight - 60;
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  // --- Tokens

  listen() {
    const { root } = this;
    let touched = false;
    root.addEventListener("pointerdown", (event) => {
      touched = event.pointerType !== "mouse";
    });
    root.addEventListener("pointerover", (event) => {
      const { view, index } = this.at(event.target);
      if (view && event.pointerType === "mouse") this.preview(view, index);
      else if (event.pointerType === "mouse") card.hidePreview();
    });
    root.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") card.hidePreview();
    });
    root.addEventListener("click", (event) => {
      const { view, index } = this.at(event.target);
      if (view && (touched || getSelection().isCollapsed)) this.open(view, index);
    });
    root.addEventListener("focusin", (event) => {
      const { view } = this.around(event.target);
      if (view && event.target.matches(".who:focus-visible")) this.preview(view, view.current);
    });
    root.addEventListener("focusout", () => card.hidePreview());
    root.addEventListener("keydown", (event) => {
      const { view } = this.around(event.target);
      if (!view?.completion.tokens.length || !event.target.matches(".who")) return;
      const by = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined && event.key !== "Enter") return;
      event.preventDefault();
      if (by) this.preview(view, view.step(by));
      else {
        this.open(view, view.current);
        $("#card button:not(.close)")?.focus();
      }
    });
    // Pressing elsewhere closes the card.
    document.addEventListener("pointerdown", (event) => {
      if (card.isOpen && !event.target.closest("#card") && !this.at(event.target).view) card.hide();
    });
    this.scroller.addEventListener("scroll", () => card.hidePreview(), { passive: true });
  }

  around(target) {
    return { view: this.views.get(target.closest?.(".completion")?.dataset.completion) };
  }

  at(target) {
    const span = target.closest?.(".who .m");
    return span ? { ...this.around(span), index: Number(span.dataset.index) } : {};
  }

  preview(view, index) {
    if (!view.completion.tokens.length) return;
    view.mark(index);
    $("#token").textContent = inWords(view.completion.tokens[index]);
    card.preview(view, index);
  }

  open(view, index) {
    card.hide();
    this.preview(view, index);
    if (view.completion.finish && !this.writer.isBusy()) card.open(view, index, this.writer);
  }
}
