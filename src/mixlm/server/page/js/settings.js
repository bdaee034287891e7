// The settings of one side: what a request says beyond its messages. Only what was changed is in them; everything else
// is the server's default.

import { $, element, percent } from "./dom.js";

export const TOP_LOGPROBS = 5; // number of most likely tokens shown for a position

export const modelOf = (models, settings) => models.find((model) => model.id === settings.model) ?? models[0];

export const memberNames = (model) => model.mixlm.members.map((member) => member.name);

// The settings of a comparison that is new: the heaviest member alone.
export const alone = (settings) => ({ ...settings, method: "single" });

// Settings without what this server does not have: they may be those of another one.
export function fitting(models, settings) {
  if (!models.length) return settings;
  const details = modelOf(models, settings).mixlm;
  const known = {
    model: models.some((model) => model.id === settings.model), unit: settings.unit in details.units,
    method: Object.values(details.units).some((methods) => methods.includes(settings.method)),
    rule: details.rules?.includes(settings.rule), weights: settings.weights?.length === details.members.length,
  };
  return Object.fromEntries(Object.entries(settings).filter(([name]) => known[name] ?? true));
}

// Returns a request without its messages.
export function requestOf(models, settings, seed) {
  const model = modelOf(models, settings), details = model.mixlm;
  const mixlm = { method: settings.method ?? details.method };
  const body = { model: model.id, logprobs: true, top_logprobs: TOP_LOGPROBS, max_tokens: settings.max_tokens ?? details.max_tokens, seed: settings.seed ?? seed, mixlm };
  for (const name of ["unit", "rule", "weights"]) if (settings[name] !== undefined) mixlm[name] = settings[name];
  // With top_logprobs, greedy would have to run every member.
  if (mixlm.method === "greedy") delete body.top_logprobs;
  else {
    if (settings.temperature !== undefined) body.temperature = settings.temperature;
    if (settings.top_k !== undefined) mixlm.top_k = settings.top_k;
  }
  return body;
}

export function described(models, settings) {
  const details = modelOf(models, settings).mixlm;
  const method = settings.method ?? details.method;
  const words = [method, `by ${settings.unit ?? details.unit}`];
  if (settings.rule) words.splice(1, 0, settings.rule);
  if (method !== "greedy") words.push(`temperature ${settings.temperature ?? details.temperature}`);
  return words.join(" · ");
}

// The form for one side. It changes the settings in place and calls onChange.
export class SettingsForm {
  constructor(models, settings, onChange) {
    this.models = models;
    this.settings = settings;
    this.onChange = onChange;
    this.root = $("#settings-form").content.cloneNode(true).firstElementChild;
    this.input("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    this.root.addEventListener("input", (event) => this.read(event.target));
    $(".defaults", this.root).addEventListener("click", () => this.reset());
    this.fill();
  }

  input(name) { return $(`[name=${name}]`, this.root); }

  // Everything is as the server's ensemble says. The model and the system prompt stay.
  reset() {
    for (const name of Object.keys(this.settings)) if (!["model", "system"].includes(name)) delete this.settings[name];
    this.fill();
    this.onChange();
  }

  fill() {
    const { settings } = this;
    const model = modelOf(this.models, settings), details = model.mixlm;
    this.input("model").value = model.id;
    $(".model", this.root).hidden = this.models.length === 1;
    options(this.input("unit"), Object.keys(details.units), settings.unit ?? details.unit);
    const methods = details.units[this.input("unit").value];
    options(this.input("method"), methods, [settings.method, details.method, methods[0]].find((name) => methods.includes(name)));
    if (settings.method !== undefined && settings.method !== this.input("method").value) settings.method = this.input("method").value;
    options(this.input("rule"), ["", ...(details.rules ?? [])], settings.rule ?? details.rule ?? "", { "": "average" });
    $(".rule", this.root).hidden = !details.rules?.length;
    for (const name of ["temperature", "top_k", "max_tokens"]) this.input(name).value = settings[name] ?? details[name];
    this.input("seed").value = settings.seed ?? "";
    this.input("system").value = settings.system ?? "";
    $(".router", this.root).hidden = !details.router;
    this.input("routed").checked = Boolean(details.router) && settings.weights === undefined;
    const weights = settings.weights ?? details.members.map((member) => member.weight);
    $(".weights", this.root).replaceChildren(...details.members.map((member, i) => element(
      "label", { className: `range m m${i % 6}` }, `${member.name} `,
      element("input", { type: "range", name: "weight", min: 0, max: 1, step: 0.01, value: weights[i], disabled: this.input("routed").checked }),
      element("output"),
    )));
    this.label();
  }

  read(input) {
    const { settings } = this;
    const { name, value } = input;
    if (name === "model") {
      for (const other of Object.keys(settings)) if (other !== "system") delete settings[other];
      settings.model = value;
    } else if (name === "weight") settings.weights = this.weights;
    else if (name === "routed") {
      if (input.checked) delete settings.weights;
      else settings.weights = this.weights;
    } else if (value === "") delete settings[name];
    else settings[name] = input.matches("[type=number], [type=range]") ? Number(value) : value;
    if (["model", "unit", "routed"].includes(name)) this.fill();
    this.label();
    this.onChange();
  }

  get weights() { return [...this.root.querySelectorAll("[name=weight]")].map((input) => Number(input.value)); }

  label() {
    const greedy = this.input("method").value === "greedy"; // greedy has no sampling options
    for (const name of ["temperature", "top_k"]) {
      const input = this.input(name);
      input.disabled = greedy;
      $("output", input.parentElement).textContent = greedy ? "–" : name === "top_k" && input.value === "0" ? "off" : input.value;
    }
    const { weights } = this, sum = weights.reduce((a, b) => a + b, 0) || 1;
    this.root.querySelectorAll(".weights output").forEach((output, i) => { output.textContent = this.input("routed").checked ? "router" : percent(weights[i] / sum); });
  }
}

function options(select, names, value, labels = {}) {
  select.replaceChildren(...names.map((name) => new Option(labels[name] ?? name, name)));
  select.value = value;
}
