// OpenAI's client on Node.
import OpenAI from "openai";

import { report } from "./features.mjs";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "any" });
const messages = [{ role: "user", content: "hello" }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "get_weather", description: "x", parameters: schema } };
const check = (text) => {
  if (!["Oslo", "Rome"].includes(JSON.parse(text).city)) throw new Error(text);
};
await report({
  async chat() {
    const completion = await client.chat.completions.create({ model: "toys", messages });
    if (!completion.choices[0].message.content) throw new Error("no text");
    await client.responses.create({ model: "toys", input: "hello" });
  },
  async stream() {
    let text = "";
    const stream = await client.chat.completions.create({ model: "toys", messages, stream: true });
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    if (!text) throw new Error("no text");
  },
  async structured() {
    const response_format = { type: "json_schema", json_schema: { name: "x", schema } };
    const completion = await client.chat.completions.create({ model: "toys", messages, response_format });
    check(completion.choices[0].message.content);
  },
  async tools() {
    const options = { model: "toys", messages, tools: [tool], tool_choice: "required", parallel_tool_calls: false };
    check((await client.chat.completions.create(options)).choices[0].message.tool_calls[0].function.arguments);
    const final = await client.chat.completions.stream(options).finalChatCompletion();
    check(final.choices[0].message.tool_calls[0].function.arguments);
  },
});
