// Draws the figures of the page, in the colours that the page has now: a figure names CSS variables.
(() => {
  "use strict";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = { displayModeBar: false, responsive: true };
  let data = JSON.parse(document.getElementById("data").textContent);

  const coloured = (value, style) => {
    if (typeof value === "string") {
      return value.includes("var(") ? value.replace(/var\((--[a-z0-9]+)\)/g, (_, name) => style.getPropertyValue(name).trim()) : value;
    }
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((part) => coloured(part, style));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, coloured(part, style)]));
    }
    return value;
  };

  // The first figure is drawn at once, the others one by one while the page can be read and scrolled already. Figures of a
  // view that is not shown have no width yet: they are drawn when it is.
  let drawing = 0;
  const draw = () => {
    const turn = ++drawing;
    const root = document.documentElement;
    const style = getComputedStyle(root);
    const places = Object.keys(data.figures).map((name) => document.getElementById(name));
    const shown = places.filter((place) => place && !place.closest("figure").hidden);
    delete root.dataset.drawn;
    const next = () => {
      if (turn !== drawing) return; // a later call draws everything
      const place = shown.shift();
      if (place) {
        const { data: traces, layout } = coloured(data.figures[place.id], style);
        if (touch) layout.dragmode = false; // a finger scrolls the page
        Plotly.react(place, traces, layout, config);
        setTimeout(next);
      } else {
        root.dataset.drawn = "all";
      }
    };
    next();
  };

  const showView = (tabs, view) => {
    for (const button of tabs.querySelectorAll("[data-view]")) {
      const on = button.dataset.view === view;
      button.setAttribute("aria-pressed", on);
      const place = document.getElementById(button.dataset.view);
      if (place) place.closest("figure").hidden = !on;
    }
    draw();
  };

  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };

  // The map of one decision: a row for each layout, a column for each batch.
  const showDecision = (place) => {
    const box = document.getElementById("maps");
    const { layouts, batches, decisions } = data.decisions;
    const made = decisions[place];
    box.dataset.place = place;
    box.querySelector("input").value = place;
    box.querySelector("output").textContent =
      `decision ${made.number} of ${decisions[decisions.length - 1].number}, after ${made.when}: ${made.outcome}`;
    const best = Math.max(...made.cells.flat().map((cell) => (cell ? cell[0] : 0)));
    const table = box.querySelector("table");
    const head = element("tr", "");
    head.append(element("th", "batch"), ...batches.map((batch) => element("th", batch, { scope: "col" })));
    const rows = layouts.map(([name, colour], row) => {
      const line = element("tr", "");
      const first = element("th", "", { scope: "row" });
      first.append(element("span", "", { class: "swatch", style: `background:${colour}` }), name);
      line.append(first);
      batches.forEach((batch, column) => {
        const cell = made.cells[row][column];
        const at = (pair) => pair && pair[0] === row && pair[1] === column;
        const mark = at(made.chosen) ? "chosen" : at(made.current) ? "current" : "";
        const box = element("td", "", { class: mark });
        if (cell) {
          const [ratio, micro, verdict] = cell;
          const share = best > 0 ? Math.max(0, ratio / best) : 0;
          box.style.background = `color-mix(in srgb, var(--good) ${Math.round(72 * share ** 3)}%, var(--card))`;
          box.append(element("b", `×${ratio.toFixed(2)}`), element("span", ` m${micro}`));
          box.title = `${name} B${batch} m${micro}: ${verdict}`;
        }
        line.append(box);
      });
      return line;
    });
    table.replaceChildren(head, ...rows);
    const facts = [["noise scale", made.noise], ["critical batch φ", made.critical], ["trade", made.trade], ["reason", made.reason]];
    const kept = facts.filter(([, value]) => value);
    box.querySelector("dl").replaceChildren(...kept.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  };

  const prepare = () => {
    for (const tabs of document.querySelectorAll("[data-tabs]")) {
      for (const button of tabs.querySelectorAll("[data-view]")) {
        button.addEventListener("click", () => showView(tabs, button.dataset.view));
      }
    }
    const box = document.getElementById("maps");
    if (box && data.decisions) {
      const slider = box.querySelector("input");
      const last = data.decisions.decisions.length - 1;
      slider.max = last;
      slider.addEventListener("input", () => showDecision(Number(slider.value)));
      for (const button of box.querySelectorAll("[data-step]")) {
        button.addEventListener("click", () => showDecision(Math.min(last, Math.max(0, Number(slider.value) + Number(button.dataset.step)))));
      }
      box.hidden = false;
      showDecision(data.decisions.first);
    }
    draw();
  };

  // A live page puts in what its server has, and keeps what the reader has opened, chosen and scrolled to.
  const renew = (page) => {
    const main = document.querySelector("main");
    const open = [...main.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent);
    const view = main.querySelector("[data-view][aria-pressed=true]");
    const maps = document.getElementById("maps");
    const before = maps && maps.dataset.place !== undefined ? { place: Number(maps.dataset.place), first: data.decisions.first } : null;
    const scrolled = window.scrollY;
    data = JSON.parse(page.getElementById("data").textContent);
    main.replaceChildren(...page.querySelector("main").childNodes);
    for (const summary of main.querySelectorAll("summary")) {
      if (open.includes(summary.textContent)) summary.parentElement.open = true;
    }
    prepare();
    const tabs = main.querySelector("[data-tabs]");
    if (view && tabs) showView(tabs, view.dataset.view);
    if (before && data.decisions && before.place !== before.first) showDecision(Math.min(before.place, data.decisions.decisions.length - 1));
    window.scrollTo(0, scrolled);
  };

  let version = "";
  const ask = async () => {
    const main = document.querySelector("main");
    try {
      const answer = await fetch("update", { headers: version ? { "If-None-Match": version } : {}, cache: "no-store" });
      if (answer.status === 200) {
        version = answer.headers.get("ETag");
        renew(new DOMParser().parseFromString(await answer.text(), "text/html"));
      }
      main.classList.toggle("lost", !answer.ok && answer.status !== 304);
    } catch {
      main.classList.add("lost");
    }
    setTimeout(ask, 3000);
  };

  dark.addEventListener("change", draw);
  prepare();
  if (document.querySelector("main[data-live]")) setTimeout(ask, 1000);
})();
