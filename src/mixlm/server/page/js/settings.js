// The settings of one side: what a request says beyond its messages. Only what was changed is in them; everything else
// is the server's default.

import { $, element, percent } from "./dom.js";

export const TOP_LOGPROBS = 5; // number of most likely tokens shown for a position

export const modelOf = (models, settings) => models.find((model) => model.id === settings.model) ?? models[0];

// The parameters of a rule: what is the default of each, and its choices where it is no number.
const PARAMETERS = { strength: "Strength", alpha: "Plausible from", form: "Form", by: "Decided by" };
const parametersOf = (details, settings) => details.rule_parameters[settings.rule ?? details.rule] ?? {};

const options = (values) => values.map((value) => new Option(value, value));

export const memberNames = (model) => model.mixlm.members.map((member) => member.name);

// The settings of a comparison that is new: the heaviest member alone.
export const alone = (settings) => ({ ...settings, method: "single" });

// Settings without what this server does not have: they may be those of another one.
export function fitting(models, settings) {
  if (!models.length) return settings;
  const details = modelOf(models, settings).mixlm;
  const known = {
    model: models.some((model) => model.id === settings.model),
    unit: settings.unit in details.units,
    method: Object.values(details.units).some((methods) => methods.includes(settings.method)),
    rule: settings.rule in details.rules,
    ...Object.fromEntries(
      Object.keys(PARAMETERS).map((name) => [name, name in parametersOf(details, settings)]),
    ),
    weights: settings.weights?.length === details.members.length,
  };
  return Object.fromEntries(Object.entries(settings).filter(([name]) => known[name] ?? true));
}

// Returns a request without its messages.
export function requestOf(models, settings, seed) {
  const model = modelOf(models, settings),
    details = model.mixlm;
  const mixlm = { method: settings.method ?? details.method };
  const body = {
    model: model.id,
    logprobs: true,
    top_logprobs: TOP_LOGPROBS,
    max_tokens: settings.max_tokens ?? details.max_tokens,
    seed: settings.seed ?? seed,
    mixlm,
  };
  for (const name of ["unit", "rule", "weights"]) if (settings[name] !== undefined) mixlm[name] = settings[name];
  for (const name of Object.keys(parametersOf(details, settings))) {
    if (settings[name] === undefined || mixlm.method === "single") continue;
    mixlm.rule = settings.rule ?? details.rule;
    mixlm[name] = settings[name];
  }
  // With top_logprobs, greedy would have to run every member.
  if (mixlm.method === "greedy") delete body.top_logprobs;
  else {
    if (settings.temperature !== undefined) body.temperature = settings.temperature;
    if (settings.top_k !== undefined) mixlm.top_k = settings.top_k;
  }
  return body;
}

// The settings in a few words.
export function described(models, settings) {
  const details = modelOf(models, settings).mixlm;
  const { method, rule, unit, temperature } = { ...details, ...settings };
  const words = [method === "single" ? `${heaviest(details, settings)} alone` : method];
  if (rule !== "average" && method !== "single") words.push(rule);
  words.push(`by ${unit}`);
  if (method !== "greedy") words.push(`temperature ${temperature}`);
  return words.join(" · ");
}

// The member that `single` takes: the first of those with the largest weight.
function heaviest({ members }, { weights = members.map((member) => member.weight) }) {
  return members[weights.indexOf(Math.max(...weights))]?.name ?? "one member"; // of a server that was another
}

// The form for one side. It changes the settings in place and calls onChange.
export class SettingsForm {
  constructor(models, settings, onChange) {
    this.models = models;
    this.settings = settings;
    this.onChange = onChange;
    this.root = $("#settings-form").content.cloneNode(true).firstElementChild;
    this.input("model").replaceChildren(...options(models.map((model) => model.id)));
    this.root.addEventListener("input", (event) => this.read(event.target));
    $(".defaults", this.root).addEventListener("click", () => this.reset());
    this.fill();
  }

  input(name) {
    return $(`[name=${name}]`, this.root);
  }

  // Everything is as the server's ensemble says. The model stays.
  reset() {
    for (const name of Object.keys(this.settings)) if (name !== "model") delete this.settings[name];
    this.fill();
    this.onChange();
  }

  fill() {
    const { settings } = this;
    const model = modelOf(this.models, settings),
      details = model.mixlm;
    this.input("model").value = model.id;
    $(".model", this.root).hidden = this.models.length === 1;
    const rule = this.offer("rule", Object.keys(details.rules));
    const methods = (unit) => details.rules[rule].filter((method) => details.units[unit].includes(method));
    const unit = this.offer(
      "unit",
      Object.keys(details.units).filter((name) => methods(name).length),
    );
    this.offer("method", methods(unit));
    $(".parameters", this.root).replaceChildren(
      ...Object.entries(parametersOf(details, settings)).map(([name, { default: preset, choices }]) => {
        const input = choices.length
          ? element("select", { name }, ...options(choices))
          : element("input", { name, type: "number", step: 0.1, placeholder: preset });
        input.value = settings[name] ?? (choices.length ? preset : "");
        return element("label", {}, `${PARAMETERS[name]} `, input);
      }),
    );
    for (const name of ["temperature", "top_k", "max_tokens"]) this.input(name).value = settings[name] ?? details[name];
    this.input("seed").value = settings.seed ?? "";
    $(".router", this.root).hidden = !details.routed;
    this.input("routed").checked = details.routed && settings.weights === undefined;
    const weights = settings.weights ?? details.members.map((member) => member.weight);
    $(".weights", this.root).replaceChildren(
      ...details.members.map((member, i) =>
        element(
          "label",
          { className: `range m m${i % 6}` },
          `${member.name} `,
          element("input", {
            type: "range",
            name: "weight",
            min: 0,
            max: 1,
            step: 0.01,
            value: weights[i],
            disabled: this.input("routed").checked,
          }),
          element("output"),
        ),
      ),
    );
    this.label();
  }

  // Offer these values of a setting. One that is no longer among them becomes the default, or else the first.
  offer(name, values) {
    const { settings } = this,
      preferred = modelOf(this.models, settings).mixlm[name];
    if (settings[name] !== undefined && !values.includes(settings[name])) delete settings[name];
    if (settings[name] === undefined && !values.includes(preferred)) settings[name] = values[0];
    const select = this.input(name);
    select.replaceChildren(...options(values));
    select.value = settings[name] ?? preferred;
    return select.value;
  }

  read(input) {
    const { settings } = this;
    const { name, value } = input;
    if (name === "model") {
      for (const other of Object.keys(settings)) delete settings[other];
      settings.model = value;
    } else if (name === "weight") settings.weights = this.weights;
    else if (name === "routed") {
      if (input.checked) delete settings.weights;
      else settings.weights = this.weights;
    } else if (name in PARAMETERS) {
      const preset = parametersOf(modelOf(this.models, settings).mixlm, settings)[name].default;
      if (value === "" || value === String(preset)) delete settings[name];
      else settings[name] = input.matches("[type=number]") ? Number(value) : value;
    } else if (value === "" || value === modelOf(this.models, settings).mixlm[name]) delete settings[name];
    else settings[name] = input.matches("[type=number], [type=range]") ? Number(value) : value;
    if (name === "rule") for (const other of ["method", ...Object.keys(PARAMETERS)]) delete settings[other]; // each has its own
    if (["model", "rule", "unit", "routed"].includes(name)) this.fill();
    this.label();
    this.onChange();
  }

  get weights() {
    return [...this.root.querySelectorAll("[name=weight]")].map((input) => Number(input.value));
  }

  label() {
    const greedy = this.input("method").value === "greedy"; // greedy has no sampling options
    for (const name of ["temperature", "top_k"]) {
      const input = this.input(name);
      input.disabled = greedy;
      $("output", input.parentElement).textContent = greedy
        ? "–"
        : name === "top_k" && input.value === "0"
          ? "off"
          : input.value;
    }
    const { weights } = this,
      sum = weights.reduce((a, b) => a + b, 0) || 1;
    this.root.querySelectorAll(".weights output").forEach((output, i) => {
      output.textContent = this.input("routed").checked ? "router" : percent(weights[i] / sum);
    });
  }
}
