// Makes elements and icons. Knows the DOM; knows nothing of chats. Text goes in as text: there is no way to pass markup.

const SPRITE = new URL("icons.svg", import.meta.url).href;
const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: `class`, `text`, `on` (listeners by event), attributes (names with a dash, or role) and properties. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name.includes("-") || name === "role" || name === "for" || name === "popovertarget") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A drawing from icons.svg; whoever holds it has the label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `${SPRITE}#${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon and no visible text. */
export function iconButton(name, label, onClick, props = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: onClick }, ...props }, icon(name));
}

/** The element with this id; the page's own markup has it. */
export const byId = (id) => document.getElementById(id);
