// A conversation as the page keeps it: its messages, its request, its title, and its forms outside. Pure: no DOM.
//
//   {id, title, named, created, updated, system, messages}      times in milliseconds since 1970
//   message: {role: "user", content}
//            {role: "assistant", content, reasoning, calls, finish, error, stats}
//            {role: "tool", id, name, content, source}          source: page, mock or typed

const TITLE_LENGTH = 60;
export const FORMAT = "tern-conversations";

/** A new conversation without messages. */
export function newConversation(now) {
  return { id: crypto.randomUUID(), title: "", named: false, created: now, updated: now, system: "", messages: [] };
}

/** The title that a conversation has by itself: how its first message begins. */
export function ownTitle(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH).trimEnd()}…` : line;
}

/** Whether a title or a message holds the words that were searched for. */
export function mentions(conversation, words) {
  const wanted = words.trim().toLowerCase();
  const holds = (text) => (text ?? "").toLowerCase().includes(wanted);
  return holds(conversation.title) || conversation.messages.some((each) => holds(each.content) || holds(each.reasoning));
}

/** Calls of the last answer that no result has been given for. */
export function openCalls({ messages }) {
  const at = messages.findLastIndex((message) => message.role !== "tool");
  const answered = new Set(messages.slice(at + 1).map((message) => message.id));
  const last = messages[at];
  if (last?.role !== "assistant" || last.finish !== "tool_calls") return [];
  return last.calls.filter((call) => !answered.has(call.id));
}

/** Whether the model is to speak next: after a user's message, or after all results. */
export function awaitsAnswer(conversation) {
  const last = conversation.messages.at(-1);
  return last?.role === "user" || (last?.role === "tool" && openCalls(conversation).length === 0);
}

/** The request for the next answer. `settings` as in settings.js; `tools` are definitions. */
export function requestFor(conversation, settings, tools) {
  const messages = conversation.messages.filter((each) => !isEmpty(each)).map(toApi);
  if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system });
  const body = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  if (tools.length) body.tools = tools;
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) if (settings[name] !== null) body[name] = settings[name];
  if (!settings.thinking) body.chat_template_kwargs = { enable_thinking: false };
  else if (settings.thinking_budget !== null) body.reasoning_max_tokens = settings.thinking_budget;
  return body;
}

const isEmpty = (message) => message.role === "assistant" && !message.content && !message.reasoning && message.calls.length === 0;

function toApi(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.id, content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const shown = { role: "assistant", content: message.content || (message.calls.length ? null : "") };
  if (message.reasoning) shown.reasoning_content = message.reasoning;
  if (message.calls.length) {
    shown.tool_calls = message.calls.map((call) => ({
      id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
    }));
  }
  return shown;
}

/** Conversations as one JSON text that `fromJson` reads again. */
export function toJson(conversations) {
  return `${JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2)}\n`;
}

/** The conversations in an exported text, with ids of their own. Throws an Error if it is something else. */
export function fromJson(text, now) {
  const value = JSON.parse(text);
  if (value?.format !== FORMAT || !Array.isArray(value.conversations)) throw new Error("format");
  return value.conversations.map((each) => readConversation(each, now));
}

function readConversation(value, now) {
  const read = newConversation(now);
  const messages = value.messages.map(readMessage);
  const time = (given) => (Number.isFinite(given) ? given : now);
  const texts = { title: String(value.title ?? ""), system: String(value.system ?? "") };
  return { ...read, ...texts, named: value.named === true, created: time(value.created), updated: time(value.updated), messages };
}

/** Only what a message may hold, each part of its type: a file may come from anywhere. */
function readMessage({ role, content, reasoning, calls, finish, stats, id, name, source }) {
  const text = (given) => String(given ?? "");
  if (role === "user") return { role, content: text(content) };
  if (role === "tool") return { role, id: text(id), name: text(name), content: text(content), source: text(source) };
  if (role !== "assistant") throw new Error("role");
  const numbers = Object.entries(stats ?? {}).filter(([, number]) => Number.isFinite(number));
  return {
    role, content: text(content), reasoning: text(reasoning), finish: finish === null ? null : text(finish), error: null,
    calls: (calls ?? []).map((call) => ({ id: text(call.id), name: text(call.name), arguments: text(call.arguments) })),
    stats: Object.fromEntries(numbers),
  };
}

/** A conversation to read: thoughts folded, calls and results as code. `words` are the headings, in the user's language. */
export function toMarkdown(conversation, words) {
  const parts = [`# ${conversation.title || words.untitled}`];
  if (conversation.system.trim()) parts.push(`> ${conversation.system.trim().replaceAll("\n", "\n> ")}`);
  for (const message of conversation.messages) parts.push(...messageParts(message, words));
  return `${parts.join("\n\n")}\n`;
}

function messageParts(message, words) {
  if (message.role === "user") return [`## ${words.you}`, message.content];
  if (message.role === "tool") return [`**${words.result}** \`${message.name}\``, fenced(message.content)];
  const parts = [`## ${words.model}`];
  if (message.reasoning) parts.push(`<details><summary>${words.thought}</summary>\n\n${fenced(message.reasoning)}\n\n</details>`);
  if (message.content) parts.push(message.content);
  for (const call of message.calls) parts.push(`**${words.call}** \`${call.name}\``, fenced(call.arguments, "json"));
  return parts;
}

/** A code block whose fence is longer than any inside. */
function fenced(text, language = "") {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map((match) => match[0].length));
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text}\n${fence}`;
}
