// Building and finding elements.

export const $ = (selector, within = document) => within.querySelector(selector);

// Properties are set where the element has them, and attributes else; null, undefined and false are left out.
export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function svg(name, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  sliders:
    "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5ZM8 13.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5Z",
  columns: "M4 5h16v14H4zM12 5v14",
  copy: "M9 9h10v10H9zM5 15V5h10",
  done: "M5 13l4 4L19 7",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  retry: "M19 12a7 7 0 1 1-2-4.9M19 4v4h-4",
  next: "M5 12h13M13 7l5 5-5 5",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  download: "M12 4v11M8 11l4 4 4-4M5 20h14",
  close: "M6 6l12 12M18 6L6 18",
  up: "M12 19V6M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
};

export function icon(name) {
  const picture = svg("svg", { viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" });
  picture.append(svg("path", { d: ICONS[name] }));
  return picture;
}

// content: a text, or several children.
export const button = (content, onclick, properties = {}) =>
  element("button", { type: "button", onclick, ...properties }, ...[content].flat());

// A button of one icon. Its label is read aloud, and shown when the pointer rests on it.
export const iconButton = (name, label, onclick, properties = {}) =>
  button(icon(name), onclick, { className: "quiet", "aria-label": label, title: label, ...properties });

// A form that does not leave the page.
export function form(send, properties, ...children) {
  const onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  return element("form", { ...properties, onsubmit }, ...children);
}

// Enter sends what a text area holds, and Shift with Enter begins a line. Escape: what it does instead.
export function onKeys(input, { enter, escape }) {
  input.addEventListener("keydown", (event) => {
    const isEnter = enter && event.key === "Enter" && !event.shiftKey && !event.isComposing;
    const act = isEnter ? enter : event.key === "Escape" ? escape : null;
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });
}

export const percent = (share) =>
  share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export function announce(text) {
  $("#status").textContent = text;
}

// The clipboard's own interface needs https or a loopback address.
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const box = element("textarea", { value: text, className: "hidden" });
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}

export function copyButton(label, text) {
  const copy = iconButton("copy", label, async () => {
    await copyText(text());
    copy.replaceChildren(icon("done"));
    announce("Copied.");
    setTimeout(() => copy.replaceChildren(icon("copy")), 1500);
  });
  return copy;
}
