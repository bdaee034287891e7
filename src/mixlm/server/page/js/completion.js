// One completion on the page: its text, read as Markdown or token by token, the timeline and what it cost.

import { $, button, copyButton, element, icon, iconButton, percent, plural, svg } from "./dom.js";
import { UNLIKELY } from "./generate.js";
import { renderMarkdown } from "./markdown.js";

const COLOURS = 6;
const FACTS_EVERY = 200; // milliseconds, while tokens arrive
const SLOWEST = 0.25; // share of the time that rendering Markdown may take while tokens arrive

export const colourOf = (members, name) =>
  name === null ? "m forced" : `m m${Math.max(members.indexOf(name), 0) % COLOURS}`;

export class CompletionView {
  // writer: what the buttons do, see writer.js.
  constructor(completion, { title, writer, isChosen, isPaired }) {
    Object.assign(this, { completion, members: completion.members, writer, isChosen, isPaired });
    this.text = element("div", { className: "text" });
    this.timeline = svg("svg", { class: "timeline", role: "img", preserveAspectRatio: "none" });
    this.error = element("div", { className: "error", role: "alert" });
    this.facts = element("ul", { className: "facts", "aria-label": "What this completion took" });
    this.buttons = element("div", { className: "actions" });
    this.root = element(
      "article",
      { className: "completion", "aria-label": title },
      element("p", { className: "completion-head" }, title),
      this.text,
      this.error,
      this.timeline,
      element("footer", {}, this.facts, this.buttons),
    );
    this.next = this.nextFacts = 0; // when Markdown and facts may be rendered again
  }

  // Show everything anew. view: "read" or "who".
  render(view) {
    this.view = view;
    this.shown = 0;
    this.text.replaceChildren();
    this.text.className = `text ${view}`;
    if (view === "who")
      Object.assign(this.text, {
        tabIndex: 0,
        role: "group",
        ariaLabel: "The arrow keys go from token to token, Enter opens the alternatives",
      });
    else for (const name of ["tabindex", "role", "aria-label"]) this.text.removeAttribute(name);
    this.timeline.replaceChildren();
    this.drawn = 0;
    this.elapsed = 0;
    this.update(true);
  }

  // Show what has arrived since.
  update(all = !this.writer.isBusy()) {
    const { completion, view } = this;
    const waiting = !completion.finish && !completion.tokens.length;
    if (view === "who") {
      this.text.append(...completion.tokens.slice(this.shown).map((token, i) => this.tokenSpan(token, this.shown + i)));
      this.shown = completion.tokens.length;
    } else if (all || performance.now() >= this.next) {
      const start = performance.now();
      this.text.replaceChildren(renderMarkdown(completion.text));
      this.next = performance.now() + (performance.now() - start) / SLOWEST;
    }
    this.root.classList.toggle("waiting", waiting);
    this.root.classList.toggle("writing", !completion.finish);
    this.drawTimeline();
    if (all || performance.now() >= this.nextFacts) {
      this.nextFacts = performance.now() + FACTS_EVERY;
      this.facts.replaceChildren(...facts(completion, this.members));
      this.timeline.setAttribute("aria-label", timelineInWords(completion, this.members));
    }
    this.error.hidden = !completion.error;
    if (completion.error)
      this.error.replaceChildren(
        element("p", {}, completion.error),
        button("Try again", () => this.writer.regenerate(completion)),
      );
    if (completion.finish && !this.writer.isBusy()) this.showButtons();
    else this.buttons.replaceChildren();
  }

  showButtons() {
    const { completion, writer } = this;
    const buttons = [
      copyButton("Copy the text", () => completion.text),
      iconButton("retry", "Write it again", () => writer.regenerate(completion)),
    ];
    if (completion.text && completion.finish !== "stop")
      buttons.push(button([icon("next"), "Go on"], () => writer.goOn(completion), { className: "quiet" }));
    if (this.isPaired) {
      buttons.push(
        element(
          "label",
          { className: "check choose" },
          element("input", {
            type: "radio",
            name: `choose-${completion.parent}`,
            checked: this.isChosen,
            onchange: () => writer.choose(completion),
          }),
          "Go on from this one",
        ),
      );
    }
    this.buttons.replaceChildren(...buttons);
  }

  tokenSpan(token, index) {
    const span = element("span", { className: colourOf(this.members, token.member), textContent: token.text });
    if (Math.exp(token.logprob) < UNLIKELY) span.classList.add("unlikely");
    span.dataset.index = index;
    return span;
  }

  // --- From token to token

  span(index) {
    return $(`[data-index="${index}"]`, this.text);
  }

  get current() {
    return Number($(".current", this.text)?.dataset.index ?? 0);
  }

  mark(index) {
    $(".current", this.text)?.classList.remove("current");
    this.span(index)?.classList.add("current");
  }

  step(by) {
    return Math.min(Math.max(this.current + by, 0), this.completion.tokens.length - 1);
  }

  // --- Forward passes: a lane for each member, time from left to right. Where another member sampled, it is paler.

  drawTimeline() {
    const { completion, members } = this;
    for (; this.drawn < completion.tokens.length; this.drawn += 1) {
      const token = completion.tokens[this.drawn];
      const width = token.seconds && Math.max(1000 * token.seconds, 1); // 0 for tokens of another version
      for (const name of Object.keys(token.forwards)) {
        this.timeline.append(
          svg("rect", {
            x: this.elapsed,
            y: members.indexOf(name) + 0.1,
            width: 0.92 * width,
            height: 0.8,
            class: `${colourOf(members, name)}${name === token.member ? "" : " other"}`,
          }),
        );
      }
      this.elapsed += width;
    }
    this.timeline.setAttribute("viewBox", `0 0 ${Math.max(this.elapsed, 1)} ${members.length}`);
    this.timeline.toggleAttribute("hidden", !completion.tokens.length);
  }
}

function timelineInWords(completion, members) {
  const ran = members.map(
    (name) =>
      `${name} ran ${plural(
        completion.tokens.reduce((sum, token) => sum + (token.forwards[name] ?? 0), 0),
        "time",
      )}`,
  );
  const tokens = plural(completion.tokens.length, "token");
  return `Forward passes: ${tokens} in ${completion.seconds.toFixed(1)} s; ${ran.join(", ")}`;
}

// How many tokens each member sampled: { name: share }.
export function shares(completion) {
  const sampled = completion.tokens.filter((token) => token.member !== null);
  const counts = {};
  for (const { member } of sampled) counts[member] = (counts[member] ?? 0) + 1;
  return Object.fromEntries(Object.entries(counts).map(([name, count]) => [name, count / sampled.length]));
}

const FINISHES = {
  stop: () => "ended by itself",
  length: (completion) => `reached ${plural(completion.request.max_tokens, "token")}`,
  stopped: () => "stopped by you",
  error: () => "not finished",
};

// The line below a completion.
function facts(completion, members) {
  const items = [];
  const add = (className, text, title) => items.push(element("li", { className, title }, text));
  const share = shares(completion);
  for (const name of members) {
    if (completion.tokens.length)
      add(
        `member ${colourOf(members, name)}`,
        `${name} ${percent(share[name] ?? 0)}`,
        `${name} sampled ${percent(share[name] ?? 0)} of the tokens`,
      );
  }
  if (completion.tokens.length) add("tokens", plural(completion.tokens.length, "token"));
  const timed = completion.tokens.filter((token) => token.seconds > 0);
  if (timed.length > 1) {
    const rest = timed.slice(1).reduce((sum, token) => sum + token.seconds, 0);
    if (rest)
      add(
        "speed",
        `${((timed.length - 1) / rest).toFixed(1)} tokens/s`,
        `first token after ${timed[0].seconds.toFixed(2)} s`,
      );
  }
  const { work } = completion;
  if (work?.tokens) {
    const all = work.members * work.tokens;
    add(
      "saved",
      `${percent(Math.max(0, 1 - work.forwards / all))} saved`,
      `${work.forwards} forwards, where running every member for every token takes ${all}`,
    );
    if (work.drafted) add("drafts", `${work.accepted} of ${work.drafted} drafts accepted`);
  }
  if (completion.finish) {
    add(
      "finish",
      FINISHES[completion.finish]?.(completion) ?? completion.finish,
      `finish_reason: ${completion.finish}`,
    );
    add("seed", `seed ${completion.request.seed}`, "The same request with this seed gives the same text");
  }
  return items;
}
