// A conversation: a tree of messages, of which one path is shown. Nothing here touches the page.
//
// A message has slots, the answers to it: what was regenerated, edited or branched is another slot. A slot of a user's
// message holds one completion, or two that were sent side by side; from the one that is `chosen` the conversation goes
// on.
// A completion has the tokens, the request without its messages, and how it ended.

const TITLE_LENGTH = 60;
const UNTITLED = "New conversation";

export class Conversation {
  constructor(data) {
    this.data = data;
  }

  // settings: of the left and the right side, see settings.js. system: the system prompt.
  static create({ settings, compare = false, system = "" }) {
    const now = Date.now();
    return new Conversation({
      id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, // http pages of other machines have no randomUUID
      title: UNTITLED,
      renamed: false,
      created: now,
      updated: now,
      settings: structuredClone(settings),
      compare,
      system,
      nodes: { root: newNode("root", null) },
    });
  }

  get isEmpty() {
    return !this.node("root").slots.length;
  }

  node(id) {
    return this.data.nodes[id];
  }

  // The turns of the path that is shown: [{ user, completions, chosen }].
  get turns() {
    const turns = [];
    let last = this.node("root");
    while (last?.slots.length) {
      const user = this.node(last.slots[last.shown].ids[0]);
      const slot = user.slots[user.shown];
      const completions = (slot?.ids ?? []).map((id) => this.node(id));
      const chosen = slot?.chosen ?? 0;
      turns.push({ user, completions, chosen });
      last = completions[chosen];
    }
    return turns;
  }

  // The message that the next one answers.
  get end() {
    const turn = this.turns.at(-1);
    return turn ? (turn.completions[turn.chosen] ?? turn.user) : this.node("root");
  }

  // The messages of a request, up to and with a user's message. Questions without an answer are left out.
  messages(user) {
    const messages = [];
    let question = user,
      answer = null;
    while (question) {
      if (!answer || answer.text) {
        if (answer) messages.unshift({ role: "assistant", content: answer.text });
        messages.unshift({ role: "user", content: question.text });
      }
      const parent = this.node(question.parent);
      if (parent.role === "root") return messages;
      answer = parent;
      question = this.node(answer.parent);
    }
    return messages;
  }

  // Add a user's message after a completion, or after the root.
  addUser(parent, text) {
    const user = { ...newNode("user", parent.id), text };
    this.addSlot(parent, [user]);
    if (!this.data.renamed && parent.role === "root") this.data.title = titleOf(text);
    return user;
  }

  // Add completions to a user's message, side by side if there are two. fields: of each, beyond those that all have.
  addCompletions(user, fields) {
    const completions = fields.map((extra) => ({
      ...newNode("assistant", user.id),
      text: "",
      tokens: [],
      request: {},
      work: null,
      seconds: 0,
      finish: null,
      error: null,
      ...extra,
    }));
    this.addSlot(user, completions);
    return completions;
  }

  addSlot(parent, nodes) {
    for (const node of nodes) this.data.nodes[node.id] = node;
    parent.slots.push({ ids: nodes.map((node) => node.id), chosen: 0 });
    parent.shown = parent.slots.length - 1;
    this.touch();
  }

  show(parent, slot) {
    parent.shown = slot;
    this.touch();
  }

  choose(completion) {
    const user = this.node(completion.parent);
    const slot = user.slots[user.shown];
    slot.chosen = slot.ids.indexOf(completion.id);
    this.touch();
  }

  rename(title) {
    Object.assign(this.data, { title, renamed: true });
  }

  touch() {
    this.data.updated = Date.now();
  }

  // A page that was closed could not say how its completions ended.
  closeOpenCompletions() {
    for (const node of Object.values(this.data.nodes)) {
      if (node.role === "assistant" && !node.finish)
        Object.assign(node, { finish: "error", error: "The page was closed before the completion was finished." });
    }
  }
}

let lastId = 0;

function newNode(role, parent) {
  lastId += 1;
  const id = role === "root" ? "root" : `${Date.now().toString(36)}-${lastId}`;
  return { id, parent, role, slots: [], shown: 0 };
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line || UNTITLED;
}
