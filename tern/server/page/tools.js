// The tools that a chat may offer: two that run in the page, and the user's own. Knows definitions and results; no DOM.

import { calculate } from "./calculator.js";
import { timeAt } from "./clock.js";

const tool = (name, description, properties, required) => ({
  type: "function",
  function: { name, description, parameters: { type: "object", properties, required } },
});

/** Tools whose results the page computes itself. */
export const DEMO_TOOLS = [
  {
    definition: tool("clock", "Get the time", { location: { type: "string" } }, []),
    run: ({ location }) => timeAt(location, new Date()),
  },
  {
    definition: tool(
      "calculator", "Calculate the expression", { expression: { type: "string", description: "the expression" } }, ["expression"],
    ),
    run: ({ expression }) => ({ result: calculate(expression ?? "") }),
  },
];

/** What the editor of a new tool begins with, and the first page's example of a tool that the user answers for. */
export const EXAMPLE_TOOL = tool(
  "get_weather", "Get the current weather", { location: { type: "string", description: "the city" } }, ["location"],
);

/** The name of a tool in either form that the user keeps: `{definition, mock}`. */
export const nameOf = (each) => each.definition.function.name;

/**
 * A tool as the user wrote it: OpenAI's form, or its `function` alone. Throws an Error whose `key` names a sentence of
 * texts.js.
 */
export function readTool(text, taken = []) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw Object.assign(new Error(error.message), { key: "toolNotJson" });
  }
  const definition = value?.type === "function" ? value : { type: "function", function: value };
  const described = definition.function;
  if (typeof described !== "object" || described === null || typeof described.name !== "string" || described.name === "") {
    throw Object.assign(new Error("name"), { key: "toolNoName" });
  }
  if (taken.includes(described.name)) throw Object.assign(new Error(described.name), { key: "toolTaken" });
  return definition;
}

/**
 * The result of a call if the page can give one: a demo tool's, or the mock that the user set; undefined if the user has
 * to type it. A tool that fails tells the model so.
 */
export function resultOf(call, userTools) {
  const demo = DEMO_TOOLS.find((each) => nameOf(each) === call.name);
  if (demo) return { content: runDemo(demo, call), source: "page" };
  const own = userTools.find((each) => nameOf(each) === call.name);
  return own?.mock ? { content: own.mock, source: "mock" } : undefined;
}

function runDemo(demo, call) {
  try {
    const given = JSON.parse(call.arguments || "{}");
    return spaced(demo.run(given ?? {}));
  } catch (error) {
    return spaced({ error: error.message });
  }
}

/** A flat object as JSON with blanks behind colons and commas, which is how models have mostly read it. */
function spaced(value) {
  return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${JSON.stringify(each)}`).join(", ")}}`;
}
