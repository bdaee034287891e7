// The card of one token: what else could have stood there. It follows the pointer; a click, a tap or Enter opens it,
// and then one can go on from each of its tokens.

import { $, button, element, percent } from "./dom.js";
import { END_OF_TEXT } from "./generate.js";
import { colourOf } from "./completion.js";

export const card = {
  get isOpen() {
    return !$("#card").hidden && $("#card").classList.contains("open");
  },

  view: null, // of the completion that the card is open for

  hide() {
    this.view = null;
    $("#card").hidden = true;
    $("#card").classList.remove("open");
  },

  hidePreview() {
    if (!this.isOpen) this.hide();
  },

  // view: of the completion. Shown beside the token, without anything to press.
  preview(view, index) {
    if (!this.isOpen) this.place(view, index, rows(view, view.completion.tokens[index]));
  },

  // writer: what the buttons do, see writer.js.
  open(view, index, writer) {
    const { completion, members } = view;
    const token = completion.tokens[index];
    const go = (text, logprob) => this.close(() => writer.branch(completion, index, text, logprob));
    const answers = element("div", { className: "answers" });
    const asked = () => this.ask(view, index, writer, answers, ask, go);
    const ask = button("What would each member have said?", asked, { className: "wide" });
    const writeOn = (member) => this.close(() => writer.writeOn(completion, index, member));
    const others = [
      button("the same settings", () => writeOn(null)),
      ...(members.length > 1 ? members : []).map((member) =>
        button(`${member} alone`, () => writeOn(member), { className: colourOf(members, member) }),
      ),
    ];
    const close = button("×", () => this.close(), { className: "quiet close", "aria-label": "Close" });
    $("#card").classList.add("open");
    this.view = view;
    this.place(view, index, [
      close,
      ...rows(view, token, go),
      ask,
      answers,
      element("p", { className: "faint" }, "Write on from here with"),
      element("div", { className: "others" }, ...others),
    ]);
  },

  async ask(view, index, writer, answers, pressed, go) {
    pressed.disabled = true;
    answers.replaceChildren(element("p", { className: "faint" }, "Asking…"));
    try {
      const said = await writer.nextTokens(view.completion, index);
      answers.replaceChildren(
        ...said.map(({ member, top }) =>
          element(
            "section",
            { className: colourOf(view.members, member) },
            element("p", {}, element("b", {}, member)),
            list(top, view.completion.tokens[index].token, go),
          ),
        ),
      );
      pressed.hidden = true;
    } catch (error) {
      answers.replaceChildren(element("p", { className: "bad" }, error.message));
      pressed.disabled = false;
    }
    if (answers.isConnected) this.position(view.span(index));
  },

  // Close it, and do what was chosen, or go back to the text.
  close(then) {
    const { view } = this;
    this.hide();
    if (then) then();
    else view?.text.focus({ preventScroll: true });
  },

  place(view, index, content) {
    const box = $("#card");
    box.replaceChildren(...content);
    for (const name of [...box.classList]) if (name !== "open") box.classList.remove(name);
    box.classList.add(...colourOf(view.members, view.completion.tokens[index].member).split(" "));
    box.hidden = false;
    box.scrollTop = 0;
    this.position(view.span(index));
  },

  // Below the token, or above it if there is no space; always inside the window. On a phone it is a sheet at the
  // bottom.
  position(span) {
    const box = $("#card");
    if (
      this.isOpen &&
      getComputedStyle(box).bottom === "0px" &&
      span.getBoundingClientRect().bottom > box.getBoundingClientRect().top
    )
      span.scrollIntoView({ block: "start" });
    const token = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const size = box.getBoundingClientRect();
    const below = token.bottom + 6,
      above = token.top - size.height - 6;
    const top = below + size.height > innerHeight - 8 && above > 8 ? above : below;
    box.style.top = `${Math.max(8, Math.min(top, innerHeight - size.height - 8))}px`;
    box.style.left = `${Math.max(8, Math.min(token.left, document.documentElement.clientWidth - size.width - 8))}px`;
  },
};

function rows(view, token, go) {
  const who = element("p", {});
  if (token.member === null) who.append("You chose this");
  else who.append(element("b", {}, token.member), " sampled this");
  const top = token.top.some(([text]) => text === token.token)
    ? token.top
    : [...token.top, [token.token, token.logprob]];
  return [who, list(top, token.token, go)];
}

// Tokens with their probabilities; go makes them buttons. What is no text cannot be gone on from.
function list(top, sampled, go) {
  return element(
    "ol",
    {},
    ...top.map(([text, logprob]) => {
      const probability = logprob === null ? 1 : Math.exp(logprob);
      const words = [
        element("span", {}, shown(text)),
        element("span", {}, logprob === null ? "sampled" : percent(probability)),
      ];
      const isText = text !== END_OF_TEXT && !text.startsWith("bytes:");
      const entry =
        go && isText && text !== sampled
          ? button(words, () => go(text, logprob), { title: "Write on from this token" })
          : element("div", {}, ...words);
      entry.style.setProperty("--share", probability);
      return element("li", { className: text === sampled ? "sampled" : "" }, entry);
    }),
  );
}

const shown = (text) => (text === END_OF_TEXT ? "end of text" : JSON.stringify(text));

// What a screen reader hears of a token.
export function inWords(token) {
  const who = token.member ?? "chosen by you";
  const others = token.top
    .filter(([text]) => text !== token.token)
    .map(([text, logprob]) => `${shown(text)} ${percent(Math.exp(logprob))}`);
  return [`${shown(token.token)}  ${who}  probability ${percent(Math.exp(token.logprob))}`, ...others].join(", ");
}
