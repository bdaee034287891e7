// Vercel's AI SDK.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { z } from "zod";

import { report } from "./features.mjs";

const provider = createOpenAICompatible({
  name: "mixlm",
  baseURL: process.argv[2] + "/v1",
  supportsStructuredOutputs: true,
});
const model = provider("toys");
const schema = z.object({ city: z.enum(["Oslo", "Rome"]), days: z.number().int().min(1).max(9) });
const check = (value) => schema.parse(value);
await report({
  async chat() {
    if (!(await generateText({ model, prompt: "hello" })).text) throw new Error("no text");
  },
  async stream() {
    let text = "";
    for await (const part of streamText({ model, prompt: "hello" }).textStream) text += part;
    if (!text) throw new Error("no text");
  },
  async structured() {
    const result = await generateText({ model, prompt: "hello", output: Output.object({ schema }) });
    check(result.output);
  },
  async tools() {
    const tools = { get_weather: tool({ description: "x", inputSchema: schema }) };
    const options = { model, prompt: "hello", tools, toolChoice: "required" };
    check((await generateText(options)).toolCalls[0].input);
    check((await streamText(options).toolCalls)[0].input);
  },
});
