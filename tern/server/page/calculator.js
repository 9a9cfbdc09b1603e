// The demo tool's arithmetic: a parser of its own, so that a model's text is never run. Knows numbers only.
//
//   sum     = product (("+" | "-") product)*
//   product = signed (("*" | "/" | "%") signed)*
//   signed  = ("-" | "+") signed | power
//   power   = atom ("^" signed)?            the right one first: 2^3^2 is 2^9, and -2^2 is -4
//   atom    = number | name | name "(" sum ")" | "(" sum ")"

export const MAX_LENGTH = 500;
const MAX_DEPTH = 60;

const CONSTANTS = new Map([["pi", Math.PI], ["e", Math.E]]);
const FUNCTIONS = new Map(
  ["sqrt", "abs", "round", "floor", "ceil", "exp", "sin", "cos", "tan", "asin", "acos", "atan"].map((name) => [name, Math[name]]),
);
FUNCTIONS.set("ln", Math.log).set("log", Math.log10);

const SPELLINGS = [[/×|·|⋅/g, "*"], [/÷/g, "/"], [/−|–/g, "-"], [/\*\*/g, "^"], [/π/g, "pi"], [/（/g, "("], [/）/g, ")"]];
const TOKEN = /\s*(?:(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z]+)|([-+*/%^()]))/y;

/** The value of an arithmetic expression. Throws an Error whose message is a sentence. */
export function calculate(expression) {
  let text = String(expression);
  if (text.length > MAX_LENGTH) throw new Error(`The expression has ${text.length} characters: at most ${MAX_LENGTH} are read.`);
  for (const [pattern, plain] of SPELLINGS) text = text.replace(pattern, plain);
  const parser = new Parser(tokens(text));
  const value = parser.sum(0);
  parser.end();
  if (!Number.isFinite(value)) throw new Error("The result is no finite number.");
  return Number(value.toPrecision(15)); // 0.1 + 0.2 is 0.3 to whoever asked
}

function tokens(text) {
  const found = [];
  TOKEN.lastIndex = 0;
  const end = text.trimEnd().length;
  while (TOKEN.lastIndex < end) {
    const at = TOKEN.lastIndex;
    const match = TOKEN.exec(text);
    if (!match) throw new Error(`The expression has something at character ${at + 1} that is no arithmetic: ${text.slice(at, at + 10).trim()}`);
    found.push(match[1] !== undefined ? Number(match[1]) : (match[2]?.toLowerCase() ?? match[3]));
  }
  return found;
}

class Parser {
  constructor(found) {
    this.tokens = found;
    this.at = 0;
  }

  sum(depth) {
    let value = this.product(depth);
    for (let sign = this.take("+", "-"); sign; sign = this.take("+", "-")) {
      const right = this.product(depth);
      value = sign === "+" ? value + right : value - right;
    }
    return value;
  }

  product(depth) {
    let value = this.signed(depth);
    for (let sign = this.take("*", "/", "%"); sign; sign = this.take("*", "/", "%")) {
      const right = this.signed(depth);
      if (sign !== "*" && right === 0) throw new Error("The expression divides by zero.");
      value = sign === "*" ? value * right : sign === "/" ? value / right : value % right;
    }
    return value;
  }

  signed(depth) {
    if (depth > MAX_DEPTH) throw new Error(`The expression is nested too deeply: at most ${MAX_DEPTH} levels are read.`);
    const sign = this.take("-", "+");
    if (!sign) return this.power(depth);
    const value = this.signed(depth + 1);
    return sign === "-" ? -value : value;
  }

  power(depth) {
    const base = this.atom(depth);
    return this.take("^") ? base ** this.signed(depth + 1) : base;
  }

  atom(depth) {
    const token = this.tokens[this.at++];
    if (typeof token === "number") return token;
    if (token === "(") return this.closed(depth);
    if (FUNCTIONS.has(token) && this.take("(")) return FUNCTIONS.get(token)(this.closed(depth));
    if (CONSTANTS.has(token)) return CONSTANTS.get(token);
    throw new Error(token === undefined ? "The expression ends too early." : `The expression has '${token}' where a number must be.`);
  }

  closed(depth) {
    const value = this.sum(depth + 1);
    if (!this.take(")")) throw new Error("The expression lacks a closing parenthesis.");
    return value;
  }

  end() {
    if (this.at < this.tokens.length) throw new Error(`The expression has '${this.tokens[this.at]}' where it should end.`);
  }

  take(...wanted) {
    return wanted.includes(this.tokens[this.at]) ? this.tokens[this.at++] : undefined;
  }
}
