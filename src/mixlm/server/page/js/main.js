// The page of `mixlm serve`, a client of its API. It loads nothing from other sites.

import { getJson, onKeyNeeded } from "./api.js";
import { card } from "./card.js";
import { shares } from "./completion.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { $, announce, button, element, icon, percent, plural } from "./dom.js";
import { exportJson, exportMarkdown } from "./export.js";
import { askForKey } from "./key.js";
import { panels } from "./panels.js";
import { alone, described, fitting, modelOf, SettingsForm } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { Thread } from "./thread.js";
import { Writer } from "./writer.js";

const BUTTON_ICONS = {
  "#toggle-list": "menu",
  "#toggle-settings": "sliders",
  "#close-settings": "close",
  "#send": "up",
  "#stop": "stop",
  "#export summary": "download",
  "#compare + span b": "columns",
};
const remembered = {
  get(name) {
    try {
      return JSON.parse(localStorage.getItem(`mixlm-${name}`));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`mixlm-${name}`, JSON.stringify(value));
    } catch {
      /* it is set again */
    }
  },
};

class App {
  async start() {
    for (const [selector, name] of Object.entries(BUTTON_ICONS)) $(selector).append(icon(name));
    const { store, lasting } = await openStore();
    this.store = store;
    $("#not-kept").hidden = lasting;
    this.view = remembered.get("view") === "read" ? "read" : "who";
    $(`#view [value=${this.view}]`).checked = true;
    this.models = [];
    this.writer = new Writer(this);
    this.composer = new Composer(this.writer);
    this.thread = new Thread(this.writer, {
      titleOf: (completion) => this.titleOf(completion),
      refresh: () => this.refresh(),
    });
    this.sidebar = new Sidebar(this);
    this.listen();
    this.models = (await getJson("v1/models")).data;
    await this.openFirst();
  }

  // --- Conversations

  async openFirst() {
    const id = decodeURIComponent(location.hash.slice(1));
    const data = id ? await this.store.get(id) : null;
    if (data) this.use(new Conversation(data));
    else this.create();
    this.conversation.closeOpenCompletions();
    this.refresh();
    if (data) this.thread.scrollToEnd();
    await this.listConversations();
  }

  // A new conversation has the settings of the last one.
  create() {
    this.use(Conversation.create(remembered.get("settings") ?? { settings: [{}, alone({})] }));
    history.replaceState(null, "", location.pathname);
  }

  use(conversation) {
    this.conversation = conversation;
    conversation.data.settings = conversation.data.settings.map((settings) => fitting(this.models, settings));
    this.showSettings();
  }

  async open(id) {
    panels.close();
    if (id === this.conversation.data.id) return;
    const { running } = this.writer;
    const isRunning = running?.conversation.data.id === id;
    this.use(isRunning ? running.conversation : new Conversation(await this.store.get(id)));
    if (!isRunning) this.conversation.closeOpenCompletions();
    history.replaceState(null, "", `#${id}`);
    this.refresh();
    this.thread.scrollToEnd();
    await this.listConversations();
  }

  async rename(id, title) {
    const conversation = await this.byId(id);
    conversation.rename(title);
    await this.save(conversation);
    await this.listConversations();
  }

  async remove(id) {
    const { running } = this.writer;
    if (running?.conversation.data.id === id) {
      running.removed = true;
      running.stop();
    }
    await this.store.delete(id);
    if (id === this.conversation.data.id) {
      this.create();
      this.refresh();
    }
    await this.listConversations();
  }

  async byId(id) {
    const loaded = [this.conversation, this.writer.running?.conversation].find(
      (conversation) => conversation?.data.id === id,
    );
    return loaded ?? new Conversation(await this.store.get(id));
  }

  async listConversations() {
    this.sidebar.render(await this.store.list(), this.conversation.data.id);
    document.title = this.conversation.isEmpty ? "mixlm" : `${this.conversation.data.title} · mixlm`;
  }

  async save(conversation = this.conversation) {
    if (conversation.isEmpty) return;
    try {
      await this.store.put(conversation.data);
    } catch (error) {
      $("#not-kept").hidden = false;
      $("#not-kept").textContent = `This browser does not keep the conversation: ${error.message}`;
    }
  }

  // --- While completions are being written

  async started(conversation) {
    this.refresh();
    this.thread.scrollToEnd();
    history.replaceState(null, "", `#${conversation.data.id}`);
    await this.save(conversation);
    await this.listConversations();
  }

  arrived(conversation, completion) {
    if (conversation === this.conversation) this.thread.update(completion);
  }

  async finished(conversation, completions) {
    if (conversation === this.conversation) {
      const follow = this.thread.isAtEnd();
      this.refresh();
      if (follow) this.thread.scrollToEnd();
      this.composer.focus();
    } else this.composer.setBusy(false);
    announce(completions.map(inWords).join(" "));
    await this.listConversations();
  }

  // --- What is shown

  changed() {
    this.save();
    this.refresh();
  }

  refresh() {
    const model = this.models.length ? modelOf(this.models, this.conversation.data.settings[0]) : null;
    this.thread.render(this.conversation, this.view, model);
    this.composer.setBusy(this.writer.isBusy());
  }

  titleOf({ request }) {
    return described(this.models, { ...request, ...request.mixlm });
  }

  // --- Settings

  showSettings() {
    const { settings, compare, system } = this.conversation.data;
    $("#compare").checked = compare;
    $("#side").hidden = !compare;
    $("#system").value = system;
    const side = compare ? Number($("#side :checked").value) : 0;
    if (this.models.length)
      $("#form").replaceChildren(new SettingsForm(this.models, settings[side], () => this.settingsChanged()).root);
    this.settingsChanged();
  }

  settingsChanged() {
    const { settings, compare, system } = this.conversation.data;
    remembered.set("settings", { settings, compare, system });
    if (!this.models.length) return;
    $("#summary").textContent = settings
      .slice(0, compare ? 2 : 1)
      .map((side) => described(this.models, side))
      .join(" | ");
    if (this.conversation.isEmpty) this.refresh(); // the first screen shows the members
  }

  // Where the right side was not set, it is the heaviest member alone.
  setCompare(compare) {
    const { data } = this.conversation;
    data.compare = compare;
    if (compare && Object.keys(data.settings[1]).every((name) => name === "method"))
      data.settings[1] = alone(data.settings[0]);
    this.showSettings();
    this.save();
  }

  // --- Everything that is pressed

  listen() {
    onKeyNeeded(askForKey);
    panels.listen();
    $("#new").addEventListener("click", async () => {
      panels.close();
      this.create();
      this.refresh();
      await this.listConversations();
      this.composer.focus();
    });
    $("#view").addEventListener("change", (event) => {
      this.view = event.target.value;
      remembered.set("view", this.view);
      const follow = this.thread.isAtEnd();
      this.refresh();
      if (follow) this.thread.scrollToEnd();
    });
    $("#compare").addEventListener("change", (event) => this.setCompare(event.target.checked));
    $("#side").addEventListener("change", () => this.showSettings());
    $("#system").addEventListener("input", (event) => {
      this.conversation.data.system = event.target.value;
      this.settingsChanged();
    });
    $("#settings").addEventListener("change", () => this.save());
    $("#summary").addEventListener("click", () => panels.toggle("settings", true));
    $("#export-markdown").addEventListener("click", () => exportMarkdown(this.conversation));
    $("#export-json").addEventListener("click", () => exportJson(this.conversation));
    document.addEventListener("click", (event) => {
      if (!event.target.closest("#export summary")) $("#export").open = false;
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !$("#key").open) this.escape();
    });
    addEventListener("resize", () => card.hide());
    addEventListener("pagehide", () => this.writer.running && this.save(this.writer.running.conversation));
  }

  // Close what lies on top, else stop.
  escape() {
    if (card.isOpen) return card.close();
    card.hide();
    if ($("#export").open) $("#export").open = false;
    else if (panels.areOver) panels.close();
    else this.writer.stop();
  }
}

function inWords(completion) {
  if (completion.error) return completion.error;
  const parts = Object.entries(shares(completion)).map(([name, share]) => `${name} ${percent(share)}`);
  return `${plural(completion.tokens.length, "token")}. ${parts.join(", ")}.`;
}

new App().start().catch((error) => {
  const again = button("Try again", () => location.reload());
  $("#thread").replaceChildren(
    element("div", { className: "error", role: "alert" }, element("p", {}, error.message), again),
  );
});
