// A reply's text with its tokens: each coloured by its probability, its alternatives in a popover.
//
// The text that the server sends is what counts; tokens are laid over it. A token may have no text of its own
// there (a special one, a part of a character, one that a stop string may still swallow), so that both come
// in their own time.

import { $, make } from "./dom.js";

const SHADES = [0.9, 0.6, 0.3, 0.1]; // p0 is likelier than the first, p4 less likely than the last
const entries = new WeakMap(); // element -> token

/** A token of either API: { text, logprob, top: [{ text, logprob }] }. */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    const short = ({ token, logprob }) => ({ text: token, logprob });
    return logprobs.content.map((one) => ({ ...short(one), top: one.top_logprobs.map(short) }));
  }
  return logprobs.tokens.map((text, at) => ({
    text,
    logprob: logprobs.token_logprobs[at],
    top: Object.entries(logprobs.top_logprobs?.[at] ?? {})
      .map(([text, logprob]) => ({ text, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

export class TokenText {
  #text = ""; // that has come and is not shown yet
  #tokens = []; // likewise
  #loose = []; // tokens whose text is a part of a character

  constructor(element) {
    this.element = element;
  }

  add(text, tokens) {
    if (!tokens.length && !this.#tokens.length && !this.#loose.length) {
      this.#plain(text);
      return;
    }
    this.#text += text;
    this.#tokens.push(...tokens);
    this.#place();
  }

  /** No more comes: what could not be matched is shown as it is. */
  end() {
    if (this.#text) this.#plain(this.#text);
    this.#text = "";
    for (const token of [...this.#loose, ...this.#tokens]) this.#span(token, "");
    this.#tokens = this.#loose = [];
    this.element.querySelector(".token")?.setAttribute("tabindex", "0");
  }

  #place() {
    while (this.#tokens.length) {
      const token = this.#tokens[0];
      if (token.text.includes("\uFFFD")) {
        this.#loose.push(this.#tokens.shift());
        continue;
      }
      const at = this.#loose.length ? this.#text.indexOf(token.text) : this.#text.startsWith(token.text) ? 0 : -1;
      if (at >= 0) {
        this.#settle(at);
        this.#span(this.#tokens.shift(), this.#take(token.text.length));
      } else if (token.text.startsWith(this.#text)) {
        return; // the rest of its text is still to come
      } else {
        this.#settle(0);
        this.#span(this.#tokens.shift(), "");
      }
    }
    if (this.#loose.length && this.#text) this.#settle(this.#text.length);
  }

  /** The next `length` characters are what the loose tokens made together. */
  #settle(length) {
    const text = this.#take(length);
    this.#loose.forEach((token, at) => this.#span(token, at === this.#loose.length - 1 ? text : ""));
    if (!this.#loose.length && text) this.#plain(text);
    this.#loose = [];
  }

  #take(length) {
    const text = this.#text.slice(0, length);
    this.#text = this.#text.slice(length);
    return text;
  }

  #plain(text) {
    if (this.element.lastChild?.nodeType === Node.TEXT_NODE) this.element.lastChild.appendData(text);
    else if (text) this.element.append(text);
  }

  #span(token, text) {
    const shade = SHADES.findIndex((least) => Math.exp(token.logprob ?? 0) >= least);
    const element = make("span", {
      class: `token p${shade < 0 ? SHADES.length : shade}${text ? "" : " unspoken"}`,
      tabindex: "-1",
      text,
    });
    entries.set(element, token);
    this.element.append(element);
  }
}

/** Shows alternatives for the tokens inside of `area`: on hover, on tap, and with the arrow keys. */
export function watchTokens(area) {
  const popover = $("popover");
  let shown = null;

  const hide = () => {
    shown?.removeAttribute("aria-describedby");
    shown = null;
    popover.hidden = true;
  };

  const show = (element) => {
    if (element === shown) return;
    hide();
    shown = element;
    element.setAttribute("aria-describedby", "popover");
    popover.replaceChildren(...describe(entries.get(element)));
    popover.hidden = false;
    const place = element.getClientRects()[0] ?? element.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = popover;
    const below = place.bottom + 6 + height <= innerHeight || place.top < height + 6;
    popover.style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 8))}px`;
    popover.style.top = `${below ? place.bottom + 6 : place.top - height - 6}px`;
  };

  const tokenAt = (event) => (event.target instanceof Element ? event.target.closest(".token") : null);
  area.addEventListener("pointerover", (event) => {
    const element = tokenAt(event);
    if (element) show(element);
    else if (shown !== document.activeElement) hide();
  });
  area.addEventListener("pointerleave", () => shown !== document.activeElement && hide());
  area.addEventListener("focusin", (event) => (tokenAt(event) ? show(tokenAt(event)) : hide()));
  area.addEventListener("focusout", hide);
  area.addEventListener("scroll", hide);
  area.addEventListener("keydown", (event) => {
    const element = tokenAt(event);
    if (!element || event.ctrlKey || event.altKey || event.metaKey) return;
    const all = [...element.parentElement.querySelectorAll(".token")];
    const at = all.indexOf(element);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || !all[to]) return;
    event.preventDefault();
    element.setAttribute("tabindex", "-1");
    all[to].setAttribute("tabindex", "0");
    all[to].focus();
  });
  return hide;
}

function describe(token) {
  const chosen = token.top.some((one) => one.text === token.text && one.logprob === token.logprob);
  const rows = chosen || token.logprob == null ? token.top : [...token.top, token];
  return [
    make("p", {}, make("strong", { text: spelled(token.text) }), ` ${percent(token.logprob)}`),
    make(
      "ul",
      {},
      ...rows.map((one) => {
        const bar = make("i", { class: "share" });
        bar.style.setProperty("--share", Math.exp(one.logprob));
        const taken = one.text === token.text && one.logprob === token.logprob;
        return make(
          "li",
          { class: taken ? "taken" : false },
          make("code", { text: spelled(one.text) }),
          bar,
          make("span", { text: percent(one.logprob) }),
          make("span", { class: "dim", text: one.logprob.toFixed(2) }),
        );
      }),
    ),
  ];
}

const percent = (logprob) => {
  if (logprob == null) return "";
  const p = Math.exp(logprob) * 100;
  return p >= 0.01 ? `${p.toFixed(p >= 99.5 || p < 10 ? 2 : 1)} %` : "under 0.01 %";
};

/** With what cannot be seen made visible. */
const spelled = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "␣");
