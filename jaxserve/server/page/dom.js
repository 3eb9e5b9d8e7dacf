// Elements by name, and new ones. Text goes in as text: nothing here or elsewhere makes markup of a string.

export const $ = (id) => document.getElementById(id);

export function make(tag, { text, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

/** 1234567 as "1,234,567"; 12.345 as "12.3". */
export function count(value) {
  return value.toLocaleString("en-US", { maximumFractionDigits: value < 10 ? 2 : value < 100 ? 1 : 0 });
}

/** Seconds as "340 ms" or "1.25 s". */
export function duration(seconds) {
  if (seconds >= 0.9995) return `${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1)} s`;
  const ms = seconds * 1000;
  return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
}
