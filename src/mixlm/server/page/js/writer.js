// What a reader does with the open conversation: ask, ask again, edit, go on, branch, compare, stop.

import { generate, nextTokens } from "./generate.js";
import { memberNames, modelOf, requestOf } from "./settings.js";

const SAVE_EVERY = 1000; // milliseconds, while a completion is being written
const randomSeed = () => Math.floor(Math.random() * 2 ** 32);

export class Writer {
  running = null; // { conversation, stop, removed } while completions are being written

  // app: conversation, models, save(conversation), started(conversation), arrived(conversation, completion),
  // finished(conversation, completions), changed().
  constructor(app) {
    this.app = app;
  }

  get conversation() {
    return this.app.conversation;
  }

  isBusy = () => this.running !== null;

  stop() {
    this.running?.stop();
  }

  send(text) {
    if (this.isBusy() || !text.trim() || !this.app.models.length) return;
    this.ask(this.conversation.addUser(this.conversation.end, text));
  }

  // Another version of a question.
  edit(user, text) {
    if (!this.isBusy()) this.ask(this.conversation.addUser(this.conversation.node(user.parent), text));
  }

  regenerate(completion) {
    if (!this.isBusy()) this.ask(this.conversation.node(completion.parent));
  }

  ask(user) {
    const { models } = this.app,
      { settings, compare, system } = this.conversation.data;
    const sides = settings.slice(0, compare ? 2 : 1);
    const seed = sides.map((side) => side.seed).find((value) => value !== undefined) ?? randomSeed();
    return this.run(
      this.conversation.addCompletions(
        user,
        sides.map((side) => ({
          request: requestOf(models, side, seed),
          system,
          members: memberNames(modelOf(models, side)),
        })),
      ),
    );
  }

  // Go on where a completion ended before its time.
  goOn(completion) {
    if (this.isBusy()) return;
    completion.request.seed = randomSeed(); // the same one would repeat the random numbers of the beginning
    this.run([completion]);
  }

  // Another version of a completion, with another token at one position.
  branch(completion, index, token, logprob) {
    const { top } = completion.tokens[index];
    this.fork(completion, index, [{ text: token, token, member: null, logprob, top }], completion.request);
  }

  // Another version of a completion from one position on: by one member alone, or, for null, by the same settings.
  writeOn(completion, index, member) {
    const request = structuredClone(completion.request);
    if (member !== null) {
      request.mixlm = { ...request.mixlm, ...alone(completion, member) };
    }
    this.fork(completion, index, [], request);
  }

  fork(completion, index, chosen, request) {
    if (this.isBusy()) return;
    const kept = [...completion.tokens.slice(0, index), ...chosen];
    const { system, members, parent } = completion;
    this.run(
      this.conversation.addCompletions(this.conversation.node(parent), [
        {
          system,
          members,
          request: { ...structuredClone(request), seed: randomSeed() },
          tokens: kept.map((token) => ({ ...token, seconds: 0, forwards: {} })),
          text: textOf(kept),
        },
      ]),
    );
  }

  // What each member would have said at a position: [{ member, top }], see generate.js.
  nextTokens(completion, index) {
    const { request, members, tokens } = completion;
    const requests = members.map((member) => ({
      ...request,
      mixlm: { ...request.mixlm, ...alone(completion, member) },
    }));
    return nextTokens(requests, members, this.messages(completion), textOf(tokens.slice(0, index)));
  }

  // The messages of a completion's request.
  messages(completion, conversation = this.conversation) {
    const system = completion.system ? [{ role: "system", content: completion.system }] : [];
    return [...system, ...conversation.messages(conversation.node(completion.parent))];
  }

  choose(completion) {
    this.conversation.choose(completion);
    this.app.changed();
  }

  show(parent, slot) {
    if (this.isBusy()) return;
    this.conversation.show(parent, slot);
    this.app.changed();
  }

  async run(completions) {
    const { app, conversation } = this;
    const control = new AbortController();
    const running = { conversation, stop: () => control.abort(), removed: false };
    this.running = running;
    for (const completion of completions) completion.finish = null;
    await app.started(conversation);
    let saved = performance.now();
    await Promise.all(
      completions.map((completion) =>
        generate(completion, this.messages(completion, conversation), control.signal, () => {
          app.arrived(conversation, completion);
          if (performance.now() < saved + SAVE_EVERY || running.removed) return;
          saved = performance.now();
          app.save(conversation);
        }),
      ),
    );
    this.running = null;
    conversation.touch();
    if (!running.removed) await app.save(conversation);
    await app.finished(conversation, completions);
  }
}

const textOf = (tokens) => tokens.map((token) => token.text).join("");

const alone = (completion, member) => ({
  method: "single",
  rule: "average",
  weights: completion.members.map((name) => (name === member ? 1 : 0)),
});
