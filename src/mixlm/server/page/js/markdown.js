// Markdown as elements. HTML in it is shown as text, and what the parser makes of the rest is sanitised.

import { Marked } from "../vendor/marked.esm.js";
import "../vendor/purify.min.js";
import { copyButton, element } from "./dom.js";

const escape = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const parser = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    // An image would be a request to wherever the text says.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

const RULES = {
  ALLOWED_TAGS: (
    "p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li a table thead tbody tr th td input"
  ).split(" "),
  ALLOWED_ATTR: ["href", "title", "align", "start", "class", "type", "checked", "disabled"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, // the values of all attributes but these are taken for addresses
  ADD_URI_SAFE_ATTR: ["align", "start", "type", "checked", "disabled"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

export function renderMarkdown(text) {
  const fragment = globalThis.DOMPurify.sanitize(parser.parse(text), RULES);
  for (const link of fragment.querySelectorAll("a"))
    Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const box of fragment.querySelectorAll("input")) if (box.type !== "checkbox") box.remove();
  for (const code of fragment.querySelectorAll("pre > code")) frame(code);
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = element("div", { className: "table" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  return fragment;
}

// A block of code, under a line with its language and a button that copies it.
function frame(code) {
  const pre = code.parentElement;
  const language = /language-([\w+#.-]+)/.exec(code.className)?.[1] ?? "";
  const box = element("div", { className: "code" });
  pre.replaceWith(box);
  pre.tabIndex = 0; // so that wide code can be scrolled by keys
  box.append(
    element(
      "div",
      { className: "code-head" },
      element("span", {}, language),
      copyButton("Copy the code", () => code.textContent),
    ),
    pre,
  );
}
