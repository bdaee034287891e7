// One completion, from its request to its end; and what each member would have said at a position.

import { postJson, stream } from "./api.js";
import { TOP_LOGPROBS } from "./settings.js";

const PATH = "v1/chat/completions";
export const UNLIKELY = 0.05; // tokens below this probability are bold
export const END_OF_TEXT = "<|endoftext|>";

// Fills in a completion: tokens, text, work, finish. It never throws; a completion that failed has an error.
// onToken is called after each token.
export async function generate(completion, messages, signal, onToken) {
  const start = performance.now() - 1000 * completion.seconds;
  let last = completion.seconds,
    forwards = {};
  completion.finish = completion.error = null;
  try {
    for await (const event of stream(
      PATH,
      { ...completion.request, ...continued(messages, completion.text) },
      signal,
    )) {
      if (event.usage) completion.work = addUsage(completion.work, event.usage);
      const choice = event.choices[0];
      if (!choice) continue;
      for (const [member, count] of Object.entries(choice.mixlm.forwards ?? {})) {
        forwards[member] = (forwards[member] ?? 0) + count;
      }
      if (choice.finish_reason) completion.finish = choice.finish_reason;
      if (!choice.mixlm.members.length) continue;
      completion.seconds = (performance.now() - start) / 1000;
      const token = tokenOf(choice, forwards, completion.seconds - last);
      completion.tokens.push(token);
      completion.text += token.text;
      last = completion.seconds;
      forwards = {};
      onToken();
    }
  } catch (error) {
    completion.finish = error.name === "AbortError" ? "stopped" : "error";
    if (completion.finish === "error") completion.error = error.message;
  }
}

// text: what is written, nothing for a token that ends within a character. forwards: each member's passes since the
// previous token.
function tokenOf(choice, forwards, seconds) {
  const scored = choice.logprobs.content[0];
  return {
    text: choice.delta.content ?? "",
    token: scored.token,
    member: choice.mixlm.members[0],
    logprob: scored.logprob,
    top: scored.top_logprobs.map((top) => [top.token, top.logprob]),
    forwards,
    seconds,
  };
}

function addUsage(work, { completion_tokens: tokens, mixlm }) {
  const members = Object.values(mixlm.members);
  const forwards = members.reduce((sum, member) => sum + member.forwards, 0);
  const added = { tokens, members: members.length, forwards, drafted: mixlm.drafted, accepted: mixlm.accepted };
  if (work) for (const name of ["tokens", "forwards", "drafted", "accepted"]) added[name] += work[name];
  return added;
}

// The fields for a completion that goes on from a text.
const continued = (messages, text) =>
  text ? { messages: [...messages, { role: "assistant", content: text }], continue_final_message: true } : { messages };

// Returns, for each member, its most likely tokens after a text: [{ member, top: [[token, logprob]] }]. Of a member that
// ended the text, the log-probability is not known: null. requests: by each member alone.
export function nextTokens(requests, members, messages, text) {
  return Promise.all(
    requests.map(async (request, i) => {
      const body = {
        ...request,
        ...continued(messages, text),
        max_tokens: 1,
        logprobs: true,
        top_logprobs: TOP_LOGPROBS,
      };
      const scored = (await postJson(PATH, body)).choices[0].logprobs.content[0];
      return {
        member: members[i],
        top: scored?.top_logprobs.map((top) => [top.token, top.logprob]) ?? [[END_OF_TEXT, null]],
      };
    }),
  );
}
