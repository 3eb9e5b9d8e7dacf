// Wires the page: what each control does, and the keys.

import { hasKey, isKept, setKey } from "./api.js";
import { $ } from "./dom.js";
import { ServerView } from "./server.js";
import { Talk } from "./talk.js";
import { watchTokens } from "./tokens.js";

const THEMES = ["system", "light", "dark"];
let model = "";
let chosen = false; // whether the person chose between chat and completion

const talk = new Talk(() => model, askForKey);
const server = new ServerView(takeState, askForKey);
const hidePopover = watchTokens($("log"));

function takeState(state) {
  model = state.model;
  if (state.chat === undefined) return;
  document.querySelector("input[value=chat]").disabled = !state.chat;
  if (!state.chat && !chosen) {
    document.querySelector("input[value=completion]").checked = true;
    showMode();
  }
  $("max_tokens").max = state.context;
}

// --- the key ---

function showKeyForm(open) {
  $("key-form").hidden = !open;
  $("key-toggle").setAttribute("aria-expanded", open);
}

function askForKey(message) {
  const first = $("key-form").hidden;
  showKeyForm(true);
  $("key-error").textContent = hasKey() ? message : "";
  if (first) $("key").focus();
}

$("key-toggle").addEventListener("click", () => {
  showKeyForm($("key-form").hidden);
  if (!$("key-form").hidden) $("key").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value, $("keep-key").checked);
  $("key-error").textContent = "";
  showKeyForm(false);
  $("key-toggle").focus();
  server.restart();
});
$("keep-key").checked = isKept();

// --- asking ---

function showMode() {
  document.body.dataset.mode = talk.mode;
  const chat = talk.mode === "chat";
  $("prompt").placeholder = chat ? "Message" : "Text to continue";
  document.querySelector("label[for=prompt]").textContent = chat ? "Message" : "Text to continue";
}

for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => {
    chosen = true;
    showMode();
  });
}
showMode();

async function send() {
  const inForm = document.activeElement === $("send");
  await talk.send();
  if (inForm || document.activeElement === document.body) $("prompt").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop-button").addEventListener("click", () => {
  talk.stop();
  $("prompt").focus(); // the button is about to be disabled
});
$("clear").addEventListener("click", () => {
  talk.clear();
  $("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) {
    hidePopover();
    talk.stop();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
    if (event.target.closest("#key-form")) return;
    event.preventDefault();
    send();
  }
});

// --- what is shown, and how ---

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const each of document.querySelectorAll("[data-show]")) each.setAttribute("aria-pressed", each === button);
  });
}

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme-name").textContent = theme;
  server.redraw();
}

$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "system";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  try {
    localStorage.setItem("jaxserve.theme", next);
  } catch {
    // storage is forbidden: the choice lasts as long as the page
  }
  showTheme(next);
});
showTheme(document.documentElement.dataset.theme ?? "system");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => server.redraw());
