// The page of `mixlm serve`: a client of the same API that anything else uses. Nothing is loaded from elsewhere.

const COLOURS = 6;
const UNLIKELY = 0.05; // below this probability a token is set bold
const ALTERNATIVES = 5; // likely tokens that a token is shown with
const $ = (selector, within = document) => within.querySelector(selector);
const percent = (share) => share > 0 && share < 0.001 ? "< 0.1 %"
  : `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

// Whoever reads the end of the page sees it grow; whoever has scrolled up is left in peace.
const atEnd = () => scrollY + innerHeight > document.documentElement.scrollHeight - 40;
const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- The API

let key = sessionStorage.getItem("mixlm-key") || "";

async function call(path, options = {}) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const error = (await response.json().catch(() => null))?.error;
    if (response.status !== 401) throw new Error(error?.message || `the server answered ${response.status}`);
    await askForKey();
  }
}

function askForKey() {
  const dialog = $("#key");
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      key = $("#key-value").value.trim();
      sessionStorage.setItem("mixlm-key", key);
      resolve();
    }, { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

// --- One conversation, with its settings

class Pane {
  constructor(models, title) {
    this.models = models;
    this.messages = [];
    this.details = new WeakMap(); // what is known of each token shown
    this.changed = new Set();
    this.root = $("#pane").content.cloneNode(true).firstElementChild;
    this.root.setAttribute("aria-label", title);
    this.title = title;
    const select = this.input("model");
    for (const one of models) select.append(new Option(one.id, one.id));
    select.addEventListener("change", () => this.useModel());
    this.input("unit").addEventListener("input", () => { this.changed.add("unit"); this.useUnit(); this.show(); });
    for (const name of ["method", "temperature", "top_k", "max_tokens", "seed"]) {
      this.input(name).addEventListener("input", () => { this.changed.add(name); this.show(); });
    }
    const talk = $(".talk", this.root);
    talk.addEventListener("pointerover", (event) => this.point(event.target.closest(".reply .m")));
    for (const name of ["pointerleave", "focusout"]) talk.addEventListener(name, () => card.hide());
    talk.addEventListener("focusin", (event) => event.target.matches(":focus-visible.reply") && this.step(event.target, 0));
    talk.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (step && event.target.matches(".reply")) { event.preventDefault(); this.step(event.target, step); }
    });
    this.useModel();
  }

  input(name) { return $(`[name=${name}]`, this.root); }

  get model() { return this.models.find((one) => one.id === this.input("model").value); }

  get members() { return this.model.mixlm.members.map((one) => one.name); }

  colour(member) { return `m m${Math.max(this.members.indexOf(member), 0) % COLOURS}`; }

  useModel() {
    const about = this.model.mixlm;
    const unit = this.input("unit");
    unit.replaceChildren(...Object.keys(about.units).map((one) => new Option(one, one)));
    unit.value = about.unit;
    this.input("method").replaceChildren();
    this.useUnit();
    for (const name of ["temperature", "top_k", "max_tokens"]) this.input(name).value = about[name];
    this.changed.clear();
    const weights = $(".weights", this.root);
    weights.replaceChildren(...about.members.map((one) => {
      const label = element("label", "", `${one.name} `);
      const input = Object.assign(element("input"), { type: "range", min: 0, max: 1, step: 0.01, value: one.weight });
      input.addEventListener("input", () => { this.changed.add("weights"); this.show(); });
      label.append(input, element("output"));
      label.className = `range ${this.colour(one.name)}`;
      return label;
    }));
    this.anew();
    this.show();
  }

  // Not every method goes with every unit.
  useUnit() {
    const about = this.model.mixlm, method = this.input("method");
    const methods = about.units[this.input("unit").value];
    const chosen = [method.value, about.method, methods[0]].find((one) => methods.includes(one));
    method.replaceChildren(...methods.map((one) => new Option(one, one)));
    method.value = chosen;
  }

  get weights() { return [...this.root.querySelectorAll(".weights input")].map((one) => Number(one.value)); }

  show() {
    const greedy = this.input("method").value === "greedy";
    for (const name of ["temperature", "top_k"]) {
      const input = this.input(name);
      input.disabled = greedy; // the most likely text of the plain average
      const off = name === "top_k" && input.value === "0";
      $("output", input.parentElement).textContent = greedy ? "–" : off ? "off" : input.value;
    }
    const weights = this.weights, sum = weights.reduce((a, b) => a + b, 0) || 1;
    this.root.querySelectorAll(".weights output").forEach((one, i) => { one.textContent = percent(weights[i] / sum); });
    const said = [this.model.id, this.input("method").value, `by ${this.input("unit").value}`];
    if (!greedy) said.push(`temperature ${this.input("temperature").value}`);
    $("summary", this.root).textContent = `${this.title}: ${said.join(" · ")}`;
    this.legend({});
  }

  legend(counts) {
    const total = Object.values(counts).reduce((a, b) => a + b, 0);
    const weights = this.weights, sum = weights.reduce((a, b) => a + b, 0) || 1;
    $(".legend", this.root).replaceChildren(...this.members.map((name, i) => {
      const item = element("li");
      item.append(element("b", this.colour(name), name), ` weight ${percent(weights[i] / sum)}`);
      if (total) item.append(`, wrote ${percent((counts[name] || 0) / total)}`);
      return item;
    }), element("li", "faint", `bold: under ${100 * UNLIKELY} % likely`));
  }

  body(seed) {
    const number = (name) => Number(this.input(name).value);
    const mixlm = { method: this.input("method").value };
    const body = {
      model: this.model.id, messages: this.messages, stream: true, stream_options: { include_usage: true },
      logprobs: true, top_logprobs: ALTERNATIVES, max_tokens: number("max_tokens") || this.model.mixlm.max_tokens, seed, mixlm,
    };
    if (this.changed.has("unit")) mixlm.unit = this.input("unit").value;
    if (this.changed.has("weights")) mixlm.weights = this.weights;
    // To tell the likeliest, greedy would have to run members that it can do without.
    if (mixlm.method === "greedy") delete body.top_logprobs;
    else {
      if (this.changed.has("temperature")) body.temperature = number("temperature");
      if (this.changed.has("top_k")) mixlm.top_k = number("top_k");
    }
    return body;
  }

  get seed() { return this.input("seed").value === "" ? null : Number(this.input("seed").value); }

  anew() {
    this.messages = [];
    $(".talk", this.root).replaceChildren();
    $(".figures", this.root).replaceChildren();
    $(".token", this.root).textContent = "";
    this.timeline = new Timeline($(".timeline", this.root), this);
  }

  async ask(prompt, seed, signal) {
    const talk = $(".talk", this.root);
    const messages = this.messages; // a new conversation has others
    messages.push({ role: "user", content: prompt });
    talk.append(element("div", "said", prompt));
    const reply = Object.assign(element("div", "reply"), { tabIndex: 0 });
    reply.setAttribute("role", "group");
    reply.setAttribute("aria-label", "Reply; the arrow keys go from token to token");
    talk.append(reply);
    const figures = new Figures($(".figures", this.root), this.members.length, seed);
    this.timeline = new Timeline($(".timeline", this.root), this);
    if (panes.length === 1) toEnd();
    const counts = {};
    let text = "", ran = {};
    try {
      const response = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(this.body(seed)), signal });
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        if (event.usage) figures.end(event.usage);
        const choice = event.choices[0];
        for (const [name, count] of Object.entries(choice?.mixlm.forwards ?? {})) ran[name] = (ran[name] || 0) + count;
        if (!choice?.mixlm.members.length) continue;
        const member = choice.mixlm.members[0];
        const token = choice.logprobs.content[0];
        counts[member] = (counts[member] || 0) + 1;
        text += token.token;
        const follow = atEnd();
        reply.append(this.token(token, member));
        this.timeline.add(member, ran, performance.now() - figures.start);
        ran = {};
        figures.token();
        this.legend(counts);
        if (follow) toEnd();
      }
    } catch (error) {
      if (error.name !== "AbortError") reply.append(element("p", "error", error.message));
    }
    if (text) messages.push({ role: "assistant", content: text });
    else messages.pop(); // a question without an answer is not part of the conversation
    const shares = Object.entries(counts).map(([name, count]) => `${name} ${percent(count / figures.tokens)}`);
    return `${this.title}: ${figures.tokens} tokens. ${shares.join(", ")}.`;
  }

  token(token, member) {
    const probability = Math.exp(token.logprob);
    const span = element("span", this.colour(member), token.token);
    if (probability < UNLIKELY) span.classList.add("unlikely");
    this.details.set(span, { token, member });
    return span;
  }

  point(span) {
    if (!span) return;
    $(".current", this.root)?.classList.remove("current");
    span.classList.add("current");
    const { token, member } = this.details.get(span);
    const others = token.top_logprobs.filter((one) => one.token !== token.token);
    $(".token", this.root).textContent = [
      `${JSON.stringify(token.token)}  ${member}  probability ${percent(Math.exp(token.logprob))}`,
      ...others.map((one) => `${JSON.stringify(one.token)} ${percent(Math.exp(one.logprob))}`),
    ].join(", ");
    card.show(span, token, member, this.colour(member));
  }

  step(reply, by) {
    const tokens = [...reply.querySelectorAll(".m")];
    const at = Math.max(tokens.findIndex((one) => one.classList.contains("current")), 0) + by;
    this.point(tokens[Math.min(Math.max(at, 0), tokens.length - 1)]);
  }
}

// --- What is known of the token that is pointed at

const card = {
  show(span, token, member, colour) {
    const box = $("#card");
    const likely = token.top_logprobs.length ? token.top_logprobs.slice(0, ALTERNATIVES) : [token];
    if (!likely.some((one) => one.token === token.token)) likely.push(token);
    const list = element("ol");
    for (const one of likely) {
      const item = element("li", one.token === token.token ? "drawn" : "");
      const probability = Math.exp(one.logprob);
      item.style.setProperty("--share", probability);
      item.append(element("span", "", JSON.stringify(one.token)), element("span", "", percent(probability)));
      list.append(item);
    }
    const title = element("p");
    title.append(element("b", colour, member), " wrote this");
    box.className = colour;
    box.replaceChildren(title, list);
    box.hidden = false;
    // Below the token, or above where there is no room; never beyond the edge of the window.
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const size = box.getBoundingClientRect();
    const below = at.bottom + 6, above = at.top - size.height - 6;
    box.style.top = `${below + size.height > innerHeight && above > 0 ? above : below}px`;
    box.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - size.width - 8))}px`;
  },
  hide() { $("#card").hidden = true; },
};

// --- Who ran when: a lane for each member, time from left to right

class Timeline {
  constructor(svg, pane) {
    this.svg = svg;
    this.pane = pane;
    this.last = 0;
    this.count = 0;
    this.forwards = {};
    svg.replaceChildren();
    svg.setAttribute("aria-label", "Who ran when: nothing yet");
  }

  // ran: how often each member ran for a token. Members that ran and did not write it are drawn paler.
  add(member, ran, time) {
    const width = Math.max(time - this.last, 1);
    for (const [name, times] of Object.entries(ran)) {
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const place = { x: this.last, y: this.pane.members.indexOf(name) + 0.1, width: 0.92 * width, height: 0.8 };
      for (const [key, value] of Object.entries(place)) rect.setAttribute(key, value);
      rect.setAttribute("class", `${this.pane.colour(name)}${name === member ? "" : " besides"}`);
      this.svg.append(rect);
      this.forwards[name] = (this.forwards[name] || 0) + times;
    }
    this.last += width;
    this.count += 1;
    this.svg.setAttribute("viewBox", `0 0 ${this.last} ${this.pane.members.length}`);
    const lanes = this.pane.members.map((name) => `${name} ran ${this.forwards[name] || 0} times`);
    this.svg.setAttribute("aria-label",
      `Who ran when: ${this.count} tokens in ${(this.last / 1000).toFixed(1)} s; ${lanes.join(", ")}`);
  }
}

// --- Figures of one reply, while it is written

class Figures {
  constructor(list, members, seed) {
    this.list = list;
    this.members = members;
    this.tokens = 0;
    this.start = performance.now();
    this.shown = new Map();
    list.replaceChildren();
    this.set("seed", seed);
  }

  token() {
    const now = performance.now();
    this.tokens += 1;
    if (this.tokens === 1) {
      this.first = now;
      this.set("first token", `${((now - this.start) / 1000).toFixed(2)} s`);
    }
    this.set("tokens", this.tokens);
    if (now > this.first) this.set("speed", `${(1000 * (this.tokens - 1) / (now - this.first)).toFixed(1)} tokens/s`);
  }

  end(usage) {
    const forwards = Object.values(usage.mixlm.members).reduce((sum, one) => sum + one.forwards, 0);
    const all = this.members * usage.completion_tokens;
    this.set("forwards", `${forwards} of ${all}`);
    if (all) this.set("saved against running every member", percent(Math.max(0, 1 - forwards / all)));
    if (usage.mixlm.checked) this.set("guesses right", `${usage.mixlm.accepted} of ${usage.mixlm.checked}`);
  }

  set(name, value) {
    if (!this.shown.has(name)) {
      const row = element("div");
      row.append(element("dt", "", name), element("dd"));
      this.list.append(row);
      this.shown.set(name, row.lastChild);
    }
    this.shown.get(name).textContent = value;
  }
}

// --- The whole page

const panes = [];
let running = null;

function add(models) {
  const pane = new Pane(models, panes.length ? "Right" : "Left");
  if (panes.length) {
    // The usual question: what would one member alone have written?
    pane.input("method").value = "single";
    pane.show();
  }
  panes.push(pane);
  $("#panes").append(pane.root);
}

async function ask() {
  const prompt = $("#prompt").value;
  if (!prompt.trim() || running) return;
  running = new AbortController();
  busy(true);
  $("#prompt").value = "";
  const seed = panes.map((one) => one.seed).find((one) => one !== null) ?? Math.floor(Math.random() * 2 ** 32);
  const said = await Promise.all(panes.map((one) => one.ask(prompt, one.seed ?? seed, running.signal)));
  $("#status").textContent = said.join(" ");
  running = null;
  busy(false);
}

function busy(now) {
  $("#send").disabled = now;
  $("#stop").disabled = !now;
  document.body.setAttribute("aria-busy", now);
}

async function begin() {
  const models = (await (await call("v1/models")).json()).data;
  add(models);
  $("#about").textContent = models.map((one) => one.id).join(", ");
  $("#compare").addEventListener("change", (event) => {
    if (event.target.checked) add(models);
    else panes.pop().root.remove();
    panes[0].title = panes.length > 1 ? "Left" : "Settings";
    panes[0].show();
  });
  panes[0].title = "Settings";
  panes[0].show();
  $("#ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("#prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    card.hide();
    running?.abort();
  });
  document.addEventListener("scroll", () => card.hide(), { passive: true });
  $("#stop").addEventListener("click", () => running?.abort());
  $("#anew").addEventListener("click", () => { running?.abort(); panes.forEach((one) => one.anew()); $("#prompt").focus(); });
}

begin().catch((error) => { $("#about").textContent = error.message; $("#about").className = "error"; });
