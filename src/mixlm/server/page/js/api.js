// The server's HTTP API.

const KEY = "mixlm-key";
const UNREACHABLE = "The server cannot be reached. Is it still running?";
const CUT_OFF = "The connection ended before the completion did.";

let key = sessionStorage.getItem(KEY) || "";
let askForKey = null; // returns a key for a message, or null

export function onKeyNeeded(ask) {
  askForKey = ask;
}

// Returns the response. Throws an Error whose message can be shown; on an unknown key it asks for another one first.
export async function call(path, body, signal) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const options =
      body === undefined ? { headers, signal } : { method: "POST", body: JSON.stringify(body), headers, signal };
    const response = await fetch(path, options).catch((error) => {
      throw readable(error, UNREACHABLE);
    });
    if (response.ok) return response;
    const error = (await response.json().catch(() => null))?.error;
    if (response.status !== 401)
      throw new Error(sentence(error?.message || `the server returned status ${response.status}`));
    const another = await askForKey(key ? "The server does not know this key." : "");
    if (another === null) throw new Error("This server needs an API key.");
    key = another;
    sessionStorage.setItem(KEY, key);
  }
}

export const getJson = async (path) => (await call(path)).json();

export const postJson = async (path, body) => (await call(path, body)).json();

// Yields the events of a stream. Throws an Error if it breaks off: a complete stream ends with [DONE].
export async function* stream(path, body, signal) {
  const response = await call(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw readable(error, CUT_OFF);
    });
    if (done) throw new Error(CUT_OFF);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (!event.startsWith("data: ")) continue;
      const data = JSON.parse(event.slice(6));
      if (data.error) throw new Error(sentence(data.error.message));
      yield data;
    }
  }
}

const readable = (error, message) => (error.name === "AbortError" ? error : new Error(message));

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
