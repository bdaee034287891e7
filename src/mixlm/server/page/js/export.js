// A conversation as a file.

import { element } from "./dom.js";

export function exportJson(conversation) {
  download(conversation, "json", "application/json", `${JSON.stringify(conversation.data, null, 1)}\n`);
}

export function exportMarkdown(conversation) {
  download(conversation, "md", "text/markdown", asMarkdown(conversation));
}

// The path that is shown. Of two completions side by side, both.
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.data.title}`];
  const { system } = conversation.data;
  if (system) parts.push(`**System**\n\n${system}`);
  for (const { user, completions } of conversation.turns) {
    parts.push(`**You**\n\n${user.text}`);
    for (const { request, text, error } of completions)
      parts.push(`**${request.model}** (${described(request)})\n\n${text || `*${error ?? "no text"}*`}`);
  }
  return `${parts.join("\n\n")}\n`;
}

function described({ mixlm = {}, seed }) {
  const { method, ...rest } = mixlm;
  return [method, ...Object.entries(rest).map(([name, value]) => `${name} ${value}`), `seed ${seed}`]
    .filter(Boolean)
    .join(", ");
}

function download(conversation, extension, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const name =
    conversation.data.title
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .toLowerCase() || "conversation";
  element("a", { href: url, download: `${name}.${extension}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
