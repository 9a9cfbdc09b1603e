// The settings that a request carries: their names, ranges and values. Knows numbers; shows nothing.

import { t } from "./texts.js";

/** Fields of numbers, with the ranges that the API accepts. Empty is null: the server's own default. */
export const FIELDS = [
  { name: "temperature", low: 0, high: 10, whole: false },
  { name: "top_p", low: 0, high: 1, whole: false, open: true },
  { name: "top_k", low: -1, high: 2 ** 31 - 1, whole: true },
  { name: "max_tokens", low: 1, high: 2 ** 31 - 1, whole: true },
  { name: "seed", low: -(2 ** 53) + 1, high: 2 ** 53 - 1, whole: true },
  { name: "thinking_budget", low: 0, high: 2 ** 31 - 1, whole: true },
];

/** The value that a field's text stands for. Throws an Error whose message is a sentence. */
export function readNumber({ name, low, high, whole, open }, text, label) {
  const given = text.trim();
  if (given === "") return null;
  const value = Number(given);
  const fits = value >= low && value <= high && (!whole || Number.isInteger(value)) && !(open && value === low);
  if (!fits) {
    const range = t(whole ? "wholeRange" : open ? "openRange" : "numberRange", { low, high });
    throw new Error(t("invalidSetting", { name: label ?? name, value: given.slice(0, 30), range }));
  }
  return value;
}
