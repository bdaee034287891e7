// The page of `mixlm serve`, a client of its API. It loads nothing from other sites.

const COLOURS = 6;
const UNLIKELY = 0.05; // tokens below this probability are bold
const TOP_LOGPROBS = 5; // number of most likely tokens shown for a position
const $ = (selector, within = document) => within.querySelector(selector);
const percent = (share) => share > 0 && share < 0.001 ? "< 0.1 %"
  : `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

// The page scrolls with the completion, unless the reader has scrolled up.
const isAtEnd = () => scrollY + innerHeight > document.documentElement.scrollHeight - 40;
const scrollToEnd = () => scrollTo(0, document.documentElement.scrollHeight);

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
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
    if (response.status !== 401) throw new Error(error?.message || `the server returned status ${response.status}`);
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
    this.details = new WeakMap(); // the log-probabilities and the member of each token
    this.changed = new Set();
    this.root = $("#pane").content.cloneNode(true).firstElementChild;
    this.root.setAttribute("aria-label", title);
    this.title = title;
    const select = this.input("model");
    for (const model of models) select.append(new Option(model.id, model.id));
    select.addEventListener("change", () => this.useModel());
    this.input("unit").addEventListener("input", () => { this.changed.add("unit"); this.useUnit(); this.show(); });
    for (const name of ["method", "temperature", "top_k", "max_tokens", "seed"]) {
      this.input(name).addEventListener("input", () => { this.changed.add(name); this.show(); });
    }
    const conversation = $(".conversation", this.root);
    conversation.addEventListener("pointerover", (event) => this.point(event.target.closest(".completion .m")));
    for (const name of ["pointerleave", "focusout"]) conversation.addEventListener(name, () => card.hide());
    conversation.addEventListener("focusin", (event) => event.target.matches(":focus-visible.completion") && this.step(event.target, 0));
    conversation.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (step && event.target.matches(".completion")) { event.preventDefault(); this.step(event.target, step); }
    });
    this.useModel();
  }

  input(name) { return $(`[name=${name}]`, this.root); }

  get model() { return this.models.find((model) => model.id === this.input("model").value); }

  get members() { return this.model.mixlm.members.map((member) => member.name); }

  colour(member) { return `m m${Math.max(this.members.indexOf(member), 0) % COLOURS}`; }

  useModel() {
    const details = this.model.mixlm;
    const unit = this.input("unit");
    unit.replaceChildren(...Object.keys(details.units).map((name) => new Option(name, name)));
    unit.value = details.unit;
    this.input("method").replaceChildren();
    this.useUnit();
    for (const name of ["temperature", "top_k", "max_tokens"]) this.input(name).value = details[name];
    this.changed.clear();
    const weights = $(".weights", this.root);
    weights.replaceChildren(...details.members.map((member) => {
      const label = element("label", "", `${member.name} `);
      const input = Object.assign(element("input"), { type: "range", min: 0, max: 1, step: 0.01, value: member.weight });
      input.addEventListener("input", () => { this.changed.add("weights"); this.show(); });
      label.append(input, element("output"));
      label.className = `range ${this.colour(member.name)}`;
      return label;
    }));
    this.reset();
    this.show();
  }

  // Each unit supports its own methods.
  useUnit() {
    const details = this.model.mixlm, method = this.input("method");
    const methods = details.units[this.input("unit").value];
    const selected = [method.value, details.method, methods[0]].find((name) => methods.includes(name));
    method.replaceChildren(...methods.map((name) => new Option(name, name)));
    method.value = selected;
  }

  get weights() { return [...this.root.querySelectorAll(".weights input")].map((input) => Number(input.value)); }

  show() {
    const greedy = this.input("method").value === "greedy";
    for (const name of ["temperature", "top_k"]) {
      const input = this.input(name);
      input.disabled = greedy; // greedy has no sampling options
      const off = name === "top_k" && input.value === "0";
      $("output", input.parentElement).textContent = greedy ? "–" : off ? "off" : input.value;
    }
    const weights = this.weights, sum = weights.reduce((a, b) => a + b, 0) || 1;
    this.root.querySelectorAll(".weights output").forEach((output, i) => { output.textContent = percent(weights[i] / sum); });
    const summary = [this.model.id, this.input("method").value, `by ${this.input("unit").value}`];
    if (!greedy) summary.push(`temperature ${this.input("temperature").value}`);
    $("summary", this.root).textContent = `${this.title}: ${summary.join(" · ")}`;
    this.legend({});
  }

  legend(counts) {
    const total = Object.values(counts).reduce((a, b) => a + b, 0);
    const weights = this.weights, sum = weights.reduce((a, b) => a + b, 0) || 1;
    $(".legend", this.root).replaceChildren(...this.members.map((name, i) => {
      const item = element("li");
      item.append(element("b", this.colour(name), name), ` weight ${percent(weights[i] / sum)}`);
      if (total) item.append(`, sampled ${percent((counts[name] || 0) / total)}`);
      return item;
    }), element("li", "faint", `bold: under ${100 * UNLIKELY} % likely`));
  }

  body(seed) {
    const number = (name) => Number(this.input(name).value);
    const mixlm = { method: this.input("method").value };
    const body = {
      model: this.model.id, messages: this.messages, stream: true, stream_options: { include_usage: true },
      logprobs: true, top_logprobs: TOP_LOGPROBS, max_tokens: number("max_tokens") || this.model.mixlm.max_tokens, seed, mixlm,
    };
    if (this.changed.has("unit")) mixlm.unit = this.input("unit").value;
    if (this.changed.has("weights")) mixlm.weights = this.weights;
    // With top_logprobs, greedy would have to run every member.
    if (mixlm.method === "greedy") delete body.top_logprobs;
    else {
      if (this.changed.has("temperature")) body.temperature = number("temperature");
      if (this.changed.has("top_k")) mixlm.top_k = number("top_k");
    }
    return body;
  }

  get seed() { return this.input("seed").value === "" ? null : Number(this.input("seed").value); }

  reset() {
    this.messages = [];
    $(".conversation", this.root).replaceChildren();
    $(".stats", this.root).replaceChildren();
    $(".token", this.root).textContent = "";
    this.timeline = new Timeline($(".timeline", this.root), this);
  }

  async send(prompt, seed, signal) {
    const conversation = $(".conversation", this.root);
    const messages = this.messages; // reset() replaces the list
    messages.push({ role: "user", content: prompt });
    conversation.append(element("div", "prompt", prompt));
    const completion = Object.assign(element("div", "completion"), { tabIndex: 0 });
    completion.setAttribute("role", "group");
    completion.setAttribute("aria-label", "Completion; the arrow keys go from token to token");
    conversation.append(completion);
    const stats = new Stats($(".stats", this.root), this.members.length, seed);
    this.timeline = new Timeline($(".timeline", this.root), this);
    if (panes.length === 1) scrollToEnd();
    const counts = {};
    let text = "", forwards = {};
    try {
      const response = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(this.body(seed)), signal });
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        if (event.usage) stats.end(event.usage);
        const choice = event.choices[0];
        for (const [name, count] of Object.entries(choice?.mixlm.forwards ?? {})) forwards[name] = (forwards[name] || 0) + count;
        if (!choice?.mixlm.members.length) continue;
        const member = choice.mixlm.members[0];
        const token = choice.logprobs.content[0];
        counts[member] = (counts[member] || 0) + 1;
        const written = choice.delta.content;
        text += written;
        const follow = isAtEnd();
        completion.append(this.token(token, member, written));
        this.timeline.add(member, forwards, performance.now() - stats.start);
        forwards = {};
        stats.token();
        this.legend(counts);
        if (follow) scrollToEnd();
      }
    } catch (error) {
      if (error.name !== "AbortError") completion.append(element("p", "error", error.message));
    }
    if (text) messages.push({ role: "assistant", content: text });
    else messages.pop(); // a prompt without a completion leaves the conversation
    const shares = Object.entries(counts).map(([name, count]) => `${name} ${percent(count / stats.tokens)}`);
    return `${this.title}: ${stats.tokens} tokens. ${shares.join(", ")}.`;
  }

  token(token, member, written) {
    const probability = Math.exp(token.logprob);
    const span = element("span", this.colour(member), written);
    if (probability < UNLIKELY) span.classList.add("unlikely");
    this.details.set(span, { token, member });
    return span;
  }

  point(span) {
    if (!span) return;
    $(".current", this.root)?.classList.remove("current");
    span.classList.add("current");
    const { token, member } = this.details.get(span);
    const others = token.top_logprobs.filter((top) => top.token !== token.token);
    $(".token", this.root).textContent = [
      `${JSON.stringify(token.token)}  ${member}  probability ${percent(Math.exp(token.logprob))}`,
      ...others.map((top) => `${JSON.stringify(top.token)} ${percent(Math.exp(top.logprob))}`),
    ].join(", ");
    card.show(span, token, member, this.colour(member));
  }

  step(completion, by) {
    const tokens = [...completion.querySelectorAll(".m")];
    const index = Math.max(tokens.findIndex((node) => node.classList.contains("current")), 0) + by;
    this.point(tokens[Math.min(Math.max(index, 0), tokens.length - 1)]);
  }
}

// --- The log-probabilities at the position under the pointer

const card = {
  show(span, token, member, colour) {
    const box = $("#card");
    const top = token.top_logprobs.length ? token.top_logprobs.slice(0, TOP_LOGPROBS) : [token];
    if (!top.some((entry) => entry.token === token.token)) top.push(token);
    const list = element("ol");
    for (const entry of top) {
      const item = element("li", entry.token === token.token ? "sampled" : "");
      const probability = Math.exp(entry.logprob);
      item.style.setProperty("--share", probability);
      item.append(element("span", "", JSON.stringify(entry.token)), element("span", "", percent(probability)));
      list.append(item);
    }
    const title = element("p");
    title.append(element("b", colour, member), " sampled this");
    box.className = colour;
    box.replaceChildren(title, list);
    box.hidden = false;
    // Below the token, or above it if there is no space; always inside the window.
    const tokenBox = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const size = box.getBoundingClientRect();
    const below = tokenBox.bottom + 6, above = tokenBox.top - size.height - 6;
    box.style.top = `${below + size.height > innerHeight && above > 0 ? above : below}px`;
    box.style.left = `${Math.max(8, Math.min(tokenBox.left, document.documentElement.clientWidth - size.width - 8))}px`;
  },
  hide() { $("#card").hidden = true; },
};

// --- Timeline of forward passes: a lane for each member, time from left to right

class Timeline {
  constructor(svg, pane) {
    this.svg = svg;
    this.pane = pane;
    this.last = 0;
    this.count = 0;
    this.forwards = {};
    svg.replaceChildren();
    svg.setAttribute("aria-label", "Forward passes: none yet");
  }

  // ran: each member's forward passes for a token. Members that did not sample it are paler.
  add(member, ran, time) {
    const width = Math.max(time - this.last, 1);
    for (const [name, times] of Object.entries(ran)) {
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const place = { x: this.last, y: this.pane.members.indexOf(name) + 0.1, width: 0.92 * width, height: 0.8 };
      for (const [key, value] of Object.entries(place)) rect.setAttribute(key, value);
      rect.setAttribute("class", `${this.pane.colour(name)}${name === member ? "" : " other"}`);
      this.svg.append(rect);
      this.forwards[name] = (this.forwards[name] || 0) + times;
    }
    this.last += width;
    this.count += 1;
    this.svg.setAttribute("viewBox", `0 0 ${this.last} ${this.pane.members.length}`);
    const lanes = this.pane.members.map((name) => `${name} ran ${this.forwards[name] || 0} times`);
    this.svg.setAttribute("aria-label",
      `Forward passes: ${this.count} tokens in ${(this.last / 1000).toFixed(1)} s; ${lanes.join(", ")}`);
  }
}

// --- Statistics of one completion

class Stats {
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
    const forwards = Object.values(usage.mixlm.members).reduce((sum, member) => sum + member.forwards, 0);
    const all = this.members * usage.completion_tokens;
    this.set("forwards", `${forwards} of ${all}`);
    if (all) this.set("saved against running every member", percent(Math.max(0, 1 - forwards / all)));
    if (usage.mixlm.checked) this.set("drafts accepted", `${usage.mixlm.accepted} of ${usage.mixlm.checked}`);
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
    // The usual comparison: one member alone.
    pane.input("method").value = "single";
    pane.show();
  }
  panes.push(pane);
  $("#panes").append(pane.root);
}

async function send() {
  const prompt = $("#prompt").value;
  if (!prompt.trim() || running) return;
  running = new AbortController();
  setBusy(true);
  $("#prompt").value = "";
  const seed = panes.map((pane) => pane.seed).find((value) => value !== null) ?? Math.floor(Math.random() * 2 ** 32);
  const summaries = await Promise.all(panes.map((pane) => pane.send(prompt, pane.seed ?? seed, running.signal)));
  $("#status").textContent = summaries.join(" ");
  running = null;
  setBusy(false);
}

function setBusy(busy) {
  $("#send").disabled = busy;
  $("#stop").disabled = !busy;
  document.body.setAttribute("aria-busy", busy);
}

async function start() {
  const models = (await (await call("v1/models")).json()).data;
  add(models);
  $("#about").textContent = models.map((model) => model.id).join(", ");
  $("#compare").addEventListener("change", (event) => {
    if (event.target.checked) add(models);
    else panes.pop().root.remove();
    panes[0].title = panes.length > 1 ? "Left" : "Settings";
    panes[0].show();
  });
  panes[0].title = "Settings";
  panes[0].show();
  $("#ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("#prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    card.hide();
    running?.abort();
  });
  document.addEventListener("scroll", () => card.hide(), { passive: true });
  $("#stop").addEventListener("click", () => running?.abort());
  $("#new").addEventListener("click", () => { running?.abort(); panes.forEach((pane) => pane.reset()); $("#prompt").focus(); });
}

start().catch((error) => { $("#about").textContent = error.message; $("#about").className = "error"; });
