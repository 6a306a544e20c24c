// Puts the newer parts of the page in place of the older ones. What is open stays open, what has the focus keeps it.
"use strict";

const EVERY_MS = 2000;
const MOST_MS = 30000;

const parts = document.getElementById("parts");
const news = document.getElementById("news");
const button = document.getElementById("pause");
let paused = false;
let failures = 0;
let timer = 0;

function say(text, stale) {
  if (news.textContent !== text) news.textContent = text;
  news.classList.toggle("stale", stale);
}

function put(fresh) {
  const open = new Set(Array.from(parts.querySelectorAll("details[open]"), (each) => each.id));
  const focused = document.activeElement;
  const within = focused && parts.contains(focused) ? focused.closest("details, a") : null;
  const again = within && (within.id ? `#${CSS.escape(within.id)} > summary` : `a[href="${CSS.escape(within.getAttribute("href"))}"]`);
  const wanted = Array.from(fresh.querySelectorAll("[data-part]"));
  const ids = new Set(wanted.map((part) => part.id));
  for (const old of Array.from(parts.children)) if (!ids.has(old.id)) old.remove();
  wanted.forEach((part, place) => {
    for (const each of part.querySelectorAll("details")) if (open.has(each.id)) each.open = true;
    const old = document.getElementById(part.id);
    if (old === null) parts.insertBefore(document.importNode(part, true), parts.children[place] || null);
    else if (!old.isEqualNode(part)) old.replaceWith(document.importNode(part, true));
  });
  if (again && !parts.contains(document.activeElement)) parts.querySelector(again)?.focus({ preventScroll: true });
}

async function refresh() {
  if (!paused && !document.hidden) {
    try {
      const answer = await fetch("/parts" + location.search, { cache: "no-store", signal: AbortSignal.timeout(15000) });
      const text = await answer.text();
      if (!answer.ok) throw new Error(text.split("\n")[0].slice(0, 200) || `error ${answer.status}`);
      put(new DOMParser().parseFromString(text, "text/html"));
      failures = 0;
      say("", false);
    } catch (error) {
      failures += 1;
      const why = error instanceof TypeError || error.name === "TimeoutError" ? "sordino web does not answer" : error.message;
      say(`What you see is old: ${why}`, true);
    }
  }
  timer = setTimeout(refresh, Math.min(MOST_MS, EVERY_MS * 2 ** Math.min(failures, 4)));
}

button.hidden = false;
button.addEventListener("click", () => {
  paused = !paused;
  button.textContent = paused ? "Go on" : "Pause";
  button.setAttribute("aria-pressed", String(paused));
  say(paused ? "Paused" : "", false);
  if (!paused) {
    clearTimeout(timer);
    refresh();
  }
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    clearTimeout(timer);
    refresh();
  }
});
timer = setTimeout(refresh, EVERY_MS);
