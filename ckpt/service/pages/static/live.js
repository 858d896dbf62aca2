// Keeps a page fresh, and shows what the pointer is on. Pages work without it.
"use strict";

(function () {
  const main = document.getElementById("main");
  const say = document.getElementById("say");
  const live = document.getElementById("live");

  function show(state, word) {
    if (!live) return;
    live.dataset.state = state;
    live.lastElementChild.textContent = word;
  }

  // ---- what the pointer is on

  function readout(target) {
    const box = target.closest(".plot, .card");
    return box && box.querySelector("[data-readout]");
  }

  document.addEventListener("pointerover", function (event) {
    const hit = event.target.closest && event.target.closest("[data-label]");
    const line = hit && readout(hit);
    if (line) line.textContent = hit.dataset.label;
  });

  document.addEventListener("click", function (event) {
    const hit = event.target.closest && event.target.closest("[data-href]");
    if (hit) window.location.assign(hit.dataset.href);
  });

  // ---- moments that pass

  function ago(seconds) {
    if (seconds < 0) return seconds > -60 ? "just now" : "in the future";
    if (seconds < 60) return Math.floor(seconds) + " s ago";
    if (seconds < 3600) return Math.floor(seconds / 60) + " min ago";
    if (seconds < 172800) return Math.floor(seconds / 3600) + " h ago";
    return Math.floor(seconds / 86400) + " days ago";
  }

  function tick() {
    for (const time of document.querySelectorAll("time[datetime]")) {
      const moment = Date.parse(time.dateTime);
      if (!Number.isNaN(moment)) time.textContent = ago((Date.now() - moment) / 1000);
    }
  }
  setInterval(tick, 5000);

  // ---- parts that are made when somebody looks

  async function load(box) {
    for (let tries = 0; tries < 120; tries += 1) {
      let answer;
      try {
        answer = await fetch(box.dataset.load, { headers: { Accept: "text/html" } });
      } catch (error) {
        return; // what is there links to it
      }
      const body = new DOMParser().parseFromString(await answer.text(), "text/html").body;
      box.replaceChildren(...body.children);
      if (answer.status !== 202) return;
      await new Promise((done) => setTimeout(done, 400));
    }
  }
  for (const box of document.querySelectorAll("[data-load]")) load(box);

  // ---- what becomes new

  if (!main || !main.dataset.live || !window.EventSource) return;

  let running = false;
  let again = false;

  async function refresh() {
    if (running) { again = true; return; }
    running = true;
    try {
      const answer = await fetch(window.location.href, { headers: { Accept: "text/html" } });
      if (answer.redirected) { window.location.reload(); return; } // the token is no longer known
      if (answer.ok) take(new DOMParser().parseFromString(await answer.text(), "text/html"));
    } catch (error) {
      show("lost", "no answer");
    } finally {
      running = false;
      if (again) { again = false; refresh(); }
    }
  }

  function take(fresh) {
    const focused = document.activeElement && document.activeElement.id;
    for (const open of document.querySelectorAll("[data-part] details[open][id]")) {
      const same = fresh.getElementById(open.id);
      if (same) same.open = true;
    }
    for (const old of document.querySelectorAll("[data-part]")) {
      const made = fresh.getElementById(old.id);
      if (made && made.innerHTML !== old.innerHTML) old.replaceWith(document.adoptNode(made));
    }
    for (const made of fresh.querySelectorAll("[data-part]")) {
      if (document.getElementById(made.id)) continue;
      const before = made.previousElementSibling && document.getElementById(made.previousElementSibling.id);
      if (before) before.after(document.adoptNode(made)); // a part that had nothing to show before
    }
    if (focused && document.activeElement === document.body) {
      const same = document.getElementById(focused);
      if (same) same.focus({ preventScroll: true });
    }
    tick();
  }

  const later = new Set();
  function soon(ms) {
    if (later.has(ms)) return;
    later.add(ms);
    setTimeout(function () { later.delete(ms); refresh(); }, ms);
  }

  function news(event) {
    let data = {};
    try { data = JSON.parse(event.data); } catch (error) { return; }
    if (say) say.textContent = event.type === "step" ? "Step " + data.step + " is there" : data.name + " is published";
    soon(50);
    soon(3000); // what it cost is told a little later
  }

  const source = new EventSource(main.dataset.live);
  let missed = false;
  source.addEventListener("open", function () {
    show("on", "live");
    if (missed) soon(50);
    missed = true;
  });
  source.addEventListener("error", function () { show("lost", "reconnecting"); });
  source.addEventListener("step", news);
  source.addEventListener("version", news);
  window.addEventListener("pagehide", function () { source.close(); });
  setInterval(function () { if (!document.hidden) refresh(); }, 10000);
})();
