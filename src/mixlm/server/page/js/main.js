// The page of `mixlm serve`, a client of its API. It loads nothing from other sites.

import { getJson, onKeyNeeded } from "./api.js";
import { Conversation } from "./conversation.js";
import { $, announce, icon, percent, plural } from "./dom.js";
import { exportJson, exportMarkdown } from "./export.js";
import { generate, nextTokens } from "./generate.js";
import { card } from "./card.js";
import { askForKey } from "./key.js";
import { shares } from "./completion.js";
import { alone, described, fitting, memberNames, modelOf, requestOf, SettingsForm } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { Thread } from "./thread.js";

const SAVE_EVERY = 1000; // milliseconds, while a completion is being written
const remembered = {
  get(name) { try { return JSON.parse(localStorage.getItem(`mixlm-${name}`)); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(`mixlm-${name}`, JSON.stringify(value)); } catch { /* it is asked again */ } },
};
const randomSeed = () => Math.floor(Math.random() * 2 ** 32);
const isNarrow = () => matchMedia("(max-width: 60rem)").matches;

class App {
  async start() {
    for (const [id, name] of Object.entries({ "toggle-list": "menu", "toggle-settings": "sliders", "close-settings": "close", send: "up", stop: "stop" })) $(`#${id}`).append(icon(name));
    $("#export summary").append(icon("download"));
    $("#compare + span b").append(icon("columns"));
    const { store, lasting } = await openStore();
    this.store = store;
    $("#not-kept").hidden = lasting;
    this.running = null; // { conversation, stop } while completions are being written
    this.view = remembered.get("view") === "read" ? "read" : "who";
    $(`#view [value=${this.view}]`).checked = true;
    this.models = [];
    this.thread = new Thread(this);
    this.sidebar = new Sidebar(this);
    this.listen();
    this.models = (await getJson("v1/models")).data;
    await this.openFirst();
  }

  // --- Conversations

  async openFirst() {
    const data = location.hash ? await this.store.get(decodeURIComponent(location.hash.slice(1))) : null;
    if (data) this.use(new Conversation(data));
    else this.create();
    this.conversation.closeOpenCompletions();
    this.refresh();
    this.thread.scrollToEnd();
    await this.listConversations();
  }

  // A new conversation has the settings of the last one.
  create() {
    const last = remembered.get("settings");
    this.use(Conversation.create(last?.settings ?? [{}, alone({})], last?.compare));
    history.replaceState(null, "", location.pathname);
  }

  use(conversation) {
    this.conversation = conversation;
    conversation.data.settings = conversation.data.settings.map((settings) => fitting(this.models, settings));
    this.showSettings();
  }

  async open(id) {
    this.closePanels();
    if (id === this.conversation.data.id) return;
    const isRunning = this.running?.conversation.data.id === id;
    this.use(isRunning ? this.running.conversation : new Conversation(await this.store.get(id)));
    if (!isRunning) this.conversation.closeOpenCompletions();
    history.replaceState(null, "", `#${id}`);
    this.refresh();
    this.thread.scrollToEnd();
    await this.listConversations();
  }

  async rename(id, title) {
    const conversation = await this.byId(id);
    conversation.rename(title);
    await this.store.put(conversation.data);
    await this.listConversations();
  }

  async remove(id) {
    if (this.running?.conversation.data.id === id) {
      this.running.removed = true;
      this.running.stop();
    }
    await this.store.delete(id);
    if (id === this.conversation.data.id) {
      this.create();
      this.refresh();
    }
    await this.listConversations();
  }

  async byId(id) {
    const open = [this.conversation, this.running?.conversation].find((conversation) => conversation?.data.id === id);
    return open ?? new Conversation(await this.store.get(id));
  }

  async listConversations() {
    this.sidebar.render(await this.store.list(), this.conversation.data.id);
    document.title = this.conversation.isEmpty ? "mixlm" : `${this.conversation.data.title} · mixlm`;
  }

  async save(conversation = this.conversation) {
    if (conversation.isEmpty) return;
    this.saved = performance.now();
    try {
      await this.store.put(conversation.data);
    } catch (error) {
      $("#not-kept").hidden = false;
      $("#not-kept").textContent = `This browser does not keep the conversation: ${error.message}`;
    }
  }

  // --- Writing

  busy = () => this.running !== null;

  members(completion) { return completion.members; }

  titleOf(completion) { return described(this.models, { ...completion.request, ...completion.request.mixlm }); }

  // The messages of a completion's request.
  messages(conversation, completion) {
    const system = completion.system ? [{ role: "system", content: completion.system }] : [];
    return [...system, ...conversation.messages(conversation.node(completion.parent))];
  }

  // The fields of new completions by the settings of each side.
  fields(conversation, sides) {
    const seed = randomSeed();
    return conversation.data.settings.slice(0, sides).map((settings) => ({
      request: requestOf(this.models, settings, seed), system: settings.system ?? "", members: memberNames(modelOf(this.models, settings)),
    }));
  }

  send(text) {
    if (this.busy() || !text.trim() || !this.models.length) return;
    this.ask(this.conversation.addUser(this.conversation.end, text));
  }

  edit(user, text) { if (!this.busy()) this.ask(this.conversation.addUser(this.conversation.node(user.parent), text)); }

  regenerate(completion) { if (!this.busy()) this.ask(this.conversation.node(completion.parent)); }

  ask(user) {
    const { conversation } = this;
    return this.run(conversation.addCompletions(user, this.fields(conversation, conversation.data.compare ? 2 : 1)));
  }

  // Go on where a completion ended before its time.
  goOn(completion) {
    if (this.busy()) return;
    completion.request.seed = randomSeed();
    this.run([completion]);
  }

  // Another version of a completion, with other tokens from one position on.
  branch(completion, index, token, logprob) {
    const { top } = completion.tokens[index];
    this.fork(completion, index, [{ text: token, token, member: null, logprob, top, forwards: {}, seconds: 0, forced: true }], completion.request);
  }

  goAlone(completion, index, member) {
    const request = structuredClone(completion.request);
    if (member !== null) {
      request.mixlm = { ...request.mixlm, method: "single", weights: completion.members.map((name) => (name === member ? 1 : 0)) };
      delete request.mixlm.rule;
    }
    this.fork(completion, index, [], request);
  }

  fork(completion, index, forced, request) {
    if (this.busy()) return;
    const tokens = [...completion.tokens.slice(0, index), ...forced].map((token) => ({ ...token, seconds: 0, forwards: {} }));
    const fields = {
      request: { ...structuredClone(request), seed: randomSeed() }, system: completion.system, members: completion.members, tokens,
      text: tokens.map((token) => token.text).join(""),
    };
    this.run(this.conversation.addCompletions(this.conversation.node(completion.parent), [fields]));
  }

  // What each member would have said at a position.
  nextTokens(completion, index) {
    const text = completion.tokens.slice(0, index).map((token) => token.text).join("");
    return nextTokens(completion.request, this.messages(this.conversation, completion), text, completion.members);
  }

  async run(completions) {
    const { conversation } = this;
    const control = new AbortController();
    const running = { conversation, stop: () => control.abort(), removed: false };
    this.running = running;
    for (const completion of completions) completion.finish = null;
    this.refresh();
    this.thread.scrollToEnd();
    await this.save(conversation);
    history.replaceState(null, "", `#${conversation.data.id}`);
    await this.listConversations();
    await Promise.all(completions.map((completion) => generate(completion, this.messages(conversation, completion), control.signal, () => {
      if (conversation === this.conversation) this.thread.update(completion);
      if (performance.now() > this.saved + SAVE_EVERY && !running.removed) this.save(conversation);
    })));
    this.running = null;
    if (!running.removed) {
      conversation.touch();
      await this.save(conversation);
    }
    if (conversation === this.conversation) this.finished(completions);
    else this.setBusy();
    await this.listConversations();
  }

  finished(completions) {
    const follow = this.thread.isAtEnd();
    this.refresh();
    if (follow) this.thread.scrollToEnd();
    announce(completions.map((completion) => completion.error ?? `${plural(completion.tokens.length, "token")}. ${Object.entries(shares(completion)).map(([name, share]) => `${name} ${percent(share)}`).join(", ")}.`).join(" "));
    if (!isNarrow()) $("#prompt").focus({ preventScroll: true });
  }

  stop() { this.running?.stop(); }

  // --- What is shown

  show(parent, slot) {
    if (this.busy()) return;
    this.conversation.show(parent, slot);
    this.changed();
  }

  choose(completion) {
    this.conversation.choose(completion);
    this.changed();
  }

  changed() {
    this.save();
    this.refresh();
  }

  refresh() {
    this.thread.render(this.conversation, this.view, modelOf(this.models, this.conversation.data.settings[0]));
    this.setBusy();
  }

  setBusy() {
    const busy = this.busy();
    $("#send").hidden = busy;
    $("#stop").hidden = !busy;
    document.body.setAttribute("aria-busy", busy);
  }

  // --- Settings

  showSettings() {
    const { settings, compare } = this.conversation.data;
    $("#compare").checked = compare;
    $("#side").hidden = !compare;
    const side = compare ? Number($("#side :checked").value) : 0;
    $("#forms").replaceChildren(new SettingsForm(this.models, settings[side], () => this.settingsChanged()).root);
    this.settingsChanged();
  }

  settingsChanged() {
    if (this.conversation.isEmpty) this.refresh(); // the first screen shows the members
    const { settings, compare } = this.conversation.data;
    remembered.set("settings", { settings, compare });
    $("#summary").textContent = settings.slice(0, compare ? 2 : 1).map((side) => described(this.models, side)).join("  |  ");
  }

  setCompare(compare) {
    this.conversation.data.compare = compare;
    this.showSettings();
    this.save();
  }

  // --- Panels: the list and the settings lie over the page where it is narrow

  toggle(name, isOpen = !document.body.classList.contains(`show-${name}`)) {
    if (isOpen && isNarrow()) this.closePanels();
    document.body.classList.toggle(`show-${name}`, isOpen);
    if (name === "settings") $("#settings").hidden = !isOpen;
    $(`#toggle-${name}`).setAttribute("aria-expanded", isOpen);
    $("#backdrop").hidden = !(isNarrow() && ["list", "settings"].some((panel) => document.body.classList.contains(`show-${panel}`)));
  }

  closePanels() { if (isNarrow()) for (const name of ["list", "settings"]) this.toggle(name, false); }

  listen() {
    onKeyNeeded(askForKey);
    const prompt = $("#prompt");
    const grow = () => { prompt.style.height = "auto"; prompt.style.height = `${Math.min(prompt.scrollHeight + 2, innerHeight / 3)}px`; };
    const submit = () => {
      if (this.busy() || !prompt.value.trim()) return;
      const text = prompt.value;
      prompt.value = "";
      grow();
      this.send(text);
    };
    prompt.addEventListener("input", grow);
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
    });
    $("#ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
    $("#stop").addEventListener("click", () => this.stop());
    $("#new").addEventListener("click", async () => {
      this.closePanels();
      this.create();
      this.refresh();
      await this.listConversations();
      prompt.focus();
    });
    $("#view").addEventListener("change", (event) => {
      this.view = event.target.value;
      remembered.set("view", this.view);
      this.refresh();
    });
    $("#compare").addEventListener("change", (event) => this.setCompare(event.target.checked));
    $("#side").addEventListener("change", () => this.showSettings());
    $("#summary").addEventListener("click", () => this.toggle("settings", true));
    for (const name of ["list", "settings"]) $(`#toggle-${name}`).addEventListener("click", () => this.toggle(name));
    $("#close-settings").addEventListener("click", () => this.toggle("settings", false));
    $("#backdrop").addEventListener("click", () => this.closePanels());
    $("#export-markdown").addEventListener("click", () => exportMarkdown(this.conversation));
    $("#export-json").addEventListener("click", () => exportJson(this.conversation));
    document.addEventListener("click", (event) => { if (!event.target.closest("#export summary")) $("#export").open = false; });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || $("#key").open) return;
      if (!$("#card").hidden) card.close();
      else if ($("#export").open) $("#export").open = false;
      else if (!$("#backdrop").hidden) this.closePanels();
      else this.stop();
    });
    addEventListener("resize", () => card.hide());
  }
}

const app = new App();
app.start().catch((error) => {
  const message = document.createElement("p");
  message.className = "error";
  message.textContent = error.message;
  $("#thread").replaceChildren(message);
});
