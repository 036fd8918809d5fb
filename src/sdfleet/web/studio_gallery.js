// All finished pictures and all jobs, newest first. Only what is in sight is in the page: ten thousand scroll as ten do.

import { call } from "./api.js";
import { may } from "./app.js";
import { text } from "./text.js";
import { Badge, Button, Fault, Icon, createStore, html, useEffect, useLayoutEffect, useRef, useState, useStore } from "./ui.js";
import { changes, likeThis, retry, show, studio } from "./studio_state.js";

const t = text.studio;
// The first page is on the screen soon; the following ones are few, for who scrolls far.
const FIRST = 100;
const PAGE = 500;
const CELL_MIN_PX = 118;
const GAP_PX = 6;
const SEARCH_AFTER_MS = 250;
// Rows above and below the window that are kept ready.
const AHEAD_ROWS = 4;

const gallery = createStore({ outputs: [], next: null, isWhole: false, isBusy: false, fault: null, search: "", favourites: false });
let asking = null;

function queryOf({ search, favourites }, more = {}) {
  const query = new URLSearchParams({ limit: FIRST, ...more });
  if (search) query.set("search", search);
  if (favourites) query.set("favourites", "true");
  return `/api/outputs?${query}`;
}

/** The first page again: what is new is put before what is known. */
async function refresh({ fromStart = false } = {}) {
  if (fromStart) asking?.abort();
  else if (gallery.get().isBusy) return;
  const mine = (asking = new AbortController());
  if (fromStart) gallery.set({ outputs: [], next: null, isWhole: false, isBusy: true });
  try {
    const page = await call(queryOf(gallery.get()), { signal: mine.signal });
    gallery.set(({ outputs, next, isWhole }) => {
      const known = new Set(page.outputs.map((output) => output.id));
      const isJoined = outputs.some((output) => known.has(output.id));
      // More is new than one page holds (or all is): begin anew, the rest follows as it is scrolled to.
      if (!isJoined) return { outputs: page.outputs, next: page.next, isWhole: page.next === null, fault: null, isBusy: false };
      const isSame = outputs.length >= page.outputs.length && page.outputs.every((output, i) => outputs[i].id === output.id && outputs[i].favourite === output.favourite);
      if (isSame) return { fault: null, isBusy: false };
      const last = page.outputs.at(-1)?.id;
      const rest = outputs.slice(outputs.findIndex((output) => output.id === last) + 1).filter((output) => !known.has(output.id));
      return { outputs: [...page.outputs, ...rest], next, isWhole, fault: null, isBusy: false };
    });
  } catch (fault) {
    if (!mine.signal.aborted) gallery.set({ fault, isBusy: false });
  }
}

async function more() {
  const { isBusy, isWhole, next } = gallery.get();
  if (isBusy || isWhole || next === null) return;
  const mine = (asking = new AbortController());
  gallery.set({ isBusy: true });
  try {
    const page = await call(queryOf(gallery.get(), { before: next, limit: PAGE }), { signal: mine.signal });
    gallery.set(({ outputs }) => {
      const known = new Set(outputs.map((output) => output.id));
      return { outputs: [...outputs, ...page.outputs.filter((output) => !known.has(output.id))], next: page.next, isWhole: page.next === null, isBusy: false, fault: null };
    });
  } catch (fault) {
    if (!mine.signal.aborted) gallery.set({ fault, isBusy: false });
  }
}

/** All pages, one after the other. */
async function all() {
  while (!gallery.get().isWhole && !gallery.get().fault) {
    if (gallery.get().isBusy) await new Promise((done) => { const stop = gallery.subscribe(({ isBusy }) => { if (!isBusy) { stop(); done(); } }); });
    else await more();
  }
}

/** Show the picture so many places further (older). */
export function step(by) {
  const { outputs } = gallery.get();
  const { shown, removed } = studio.get();
  const there = outputs.filter((output) => !removed.has(output.id));
  const at = there.findIndex((output) => output.id === shown?.id);
  const next = there[at < 0 ? 0 : Math.min(there.length - 1, Math.max(0, at + by))];
  if (next) show(next);
  if (at > there.length - 20) more();
}

export function Gallery() {
  const [tab, setTab] = useState("pictures");
  return html`<aside class="gallery card" aria-label=${t.gallery}>
    <div class="tabs" role="tablist" aria-label=${t.gallery}>${["pictures", "jobs"].map((name) => html`<button type="button" role="tab" key=${name} id=${`tab-${name}`}
      aria-selected=${String(tab === name)} aria-controls="gallery-panel" onClick=${() => setTab(name)}>${t.tabs[name]}</button>`)}</div>
    <div role="tabpanel" id="gallery-panel" aria-labelledby=${`tab-${tab}`} class="gallery-panel">${tab === "pictures" ? html`<${Pictures} />` : html`<${History} />`}</div>
  </aside>`;
}

function Pictures() {
  const { outputs, isWhole, isBusy, fault, search, favourites } = useStore(gallery);
  const { newest, removed, comparing } = useStore(studio);
  const there = removed.size ? outputs.filter((output) => !removed.has(output.id)) : outputs;
  useEffect(() => { refresh({ fromStart: outputs.length === 0 }); }, [newest]);
  useEffect(() => changes.subscribe(({ output }) => output && gallery.set((now) => ({ outputs: now.outputs.map((one) => (one.id === output.id ? output : one)) }))), []);
  return html`<div class="gallery-head"><${Search} value=${search} label=${t.searchPictures} onSearch=${(value) => { gallery.set({ search: value }); refresh({ fromStart: true }); }} />
      <${Button} icon="star" filled=${favourites} pressed=${favourites} label=${t.onlyFavourites} onClick=${() => { gallery.set({ favourites: !favourites }); refresh({ fromStart: true }); }} /></div>
    ${comparing && html`<div class="note"><${Icon} name="compare" /><span class="grow">${t.comparePick}</span><${Button} kind="quiet" class="small" onClick=${() => studio.set({ comparing: null })}>${text.cancel}<//></div>`}
    ${fault && html`<${Fault} error=${fault}><${Button} class="small" onClick=${() => refresh({ fromStart: true })}>${t.tryAgain}<//><//>`}
    ${there.length === 0 && isWhole && !fault && html`<p class="nothing">${search || favourites ? t.nothingFound : t.noPictures}</p>`}
    <${Grid} outputs=${there} isWhole=${isWhole} isBusy=${isBusy} />`;
}

function Search({ value, label, onSearch }) {
  const [said, setSaid] = useState(value);
  useEffect(() => {
    if (said === value) return undefined;
    const timer = setTimeout(() => onSearch(said), SEARCH_AFTER_MS);
    return () => clearTimeout(timer);
  }, [said]);
  return html`<div class="search grow"><${Icon} name="search" /><input class="input" type="search" aria-label=${label} placeholder=${label} value=${said} onInput=${(event) => setSaid(event.target.value)} /></div>`;
}

/** The cells that are in sight, on a sheet as high as all of them. */
function Grid({ outputs, isWhole, isBusy }) {
  const sheet = useRef(null);
  const [view, setView] = useState({ width: 0, from: 0, to: 20 });
  const shown = useStore(studio, (state) => state.shown);
  const columns = Math.max(2, Math.floor((view.width + GAP_PX) / (CELL_MIN_PX + GAP_PX)));
  const side = view.width ? (view.width - GAP_PX * (columns - 1)) / columns : CELL_MIN_PX;
  const pitch = side + GAP_PX;
  const rows = Math.ceil(outputs.length / columns);

  useLayoutEffect(() => {
    const element = sheet.current;
    let isDue = false;
    const look = () => {
      isDue = false;
      const box = element.getBoundingClientRect();
      const frame = element.closest(".gallery-panel").getBoundingClientRect();
      // Whether the panel scrolls (wide) or the page does (narrow): what counts is what of the sheet is in the window.
      const above = Math.max(0, Math.max(frame.top, 0) - box.top);
      const below = Math.max(0, Math.min(innerHeight, Math.max(frame.bottom, 0)) - box.top);
      const from = Math.max(0, Math.floor(above / pitch) - AHEAD_ROWS);
      const to = Math.max(from + 1, Math.ceil(below / pitch) + AHEAD_ROWS);
      setView((now) => (now.width === box.width && now.from === from && now.to === to ? now : { width: box.width, from, to }));
    };
    const soon = () => {
      if (!isDue) requestAnimationFrame(look);
      isDue = true;
    };
    look();
    addEventListener("scroll", soon, { capture: true, passive: true });
    const sizes = new ResizeObserver(soon);
    sizes.observe(element);
    sizes.observe(element.closest(".gallery-panel"));
    return () => { removeEventListener("scroll", soon, { capture: true }); sizes.disconnect(); };
  }, [pitch]);

  useEffect(() => {
    if (!isWhole && !isBusy && view.to * columns > outputs.length - FIRST) more();
  }, [view.to, columns, outputs.length, isWhole, isBusy]);

  const first = Math.min(view.from, rows) * columns;
  const inSight = outputs.slice(first, view.to * columns);
  // A cell far away is in the page only after the sheet was scrolled there.
  const goTo = (index) => {
    const cell = () => sheet.current?.querySelector(`[data-index="${index}"]`);
    if (!cell()) {
      const panel = sheet.current.closest(".gallery-panel");
      const frame = panel.scrollHeight > panel.clientHeight ? panel : document.scrollingElement;
      const top = sheet.current.getBoundingClientRect().top - (frame === panel ? panel.getBoundingClientRect().top : 0);
      frame.scrollTop += top + Math.floor(index / columns) * pitch - frame.clientHeight / 2;
    }
    // The cells are drawn in the frame after the one that sees the scrolling.
    const focus = (nLeft) => {
      if (!cell()) return void (nLeft && requestAnimationFrame(() => focus(nLeft - 1)));
      cell().focus();
      cell().scrollIntoView({ block: "nearest" });
    };
    focus(10);
  };
  const onKeyDown = async (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!by && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === "End") await all();
    const n = gallery.get().outputs.length - studio.get().removed.size;
    const to = by ? Number(event.target.dataset.index) + by : event.key === "Home" ? 0 : n - 1;
    if (to >= 0 && to < n) goTo(to);
  };
  return html`<ul class="sheet" ref=${sheet} style=${{ height: `${rows * pitch}px` }} onKeyDown=${onKeyDown} aria-label=${t.picturesLabel(outputs.length, isWhole)}>
    ${inSight.map((output, i) => {
      const index = first + i;
      return html`<li key=${output.id} style=${{ width: `${side}px`, height: `${side}px`, transform: `translate(${(index % columns) * pitch}px, ${Math.floor(index / columns) * pitch}px)` }}>
        <button type="button" class="cell" data-index=${index} aria-current=${shown?.id === output.id ? "true" : null} title=${output.prompt} onClick=${() => show(output)}>
          <img src=${output.thumbnail_url} alt=${output.prompt || t.pictureAlt(output.seed)} loading="lazy" decoding="async" draggable="true"
            onDragStart=${(event) => event.dataTransfer.setData("text/x-sdfleet-output", output.url)} />
          ${output.favourite && html`<${Icon} name="star" filled title=${t.isFavourite} />`}</button></li>`;
    })}</ul>`;
}

function History() {
  const [search, setSearch] = useState("");
  const [{ jobs, next, fault }, setPage] = useState({ jobs: null, next: null, fault: null });
  const { newest, jobs: open } = useStore(studio);
  const ask = async (before) => {
    const query = new URLSearchParams({ limit: 50, ...(before ? { before } : {}), ...(search ? { search } : {}) });
    try {
      const page = await call(`/api/jobs?${query}`);
      setPage((now) => ({ jobs: before ? [...now.jobs, ...page.jobs] : page.jobs, next: page.next, fault: null }));
    } catch (error) {
      setPage((now) => ({ ...now, fault: error }));
    }
  };
  useEffect(() => { ask(null); }, [search, newest, open.length]);
  return html`<div class="gallery-head"><${Search} value=${search} label=${t.searchJobs} onSearch=${setSearch} /></div>
    ${fault && html`<${Fault} error=${fault} />`}
    ${jobs?.length === 0 && html`<p class="nothing">${search ? t.nothingFound : t.noJobs}</p>`}
    <ul class="history">${jobs?.map((job) => html`<li key=${job.id}>
      <div class="row"><${Badge} kind=${{ done: "good", failed: "bad", running: "accent" }[job.state] ?? "plain"}>${t.states[job.state]}<//>
        <span class="hint num grow">${t.when(job.created)}</span>
        ${may("generate") && job.state === "failed" && html`<${Button} kind="quiet" class="small" icon="again" label=${t.tryAgain} onClick=${() => retry(job.id)} />`}
        <${Button} kind="quiet" class="small" icon="wand" label=${t.like} onClick=${() => likeThis({ ...job, source: "sdfleet", strength: null, seed: String(job.seed) })} /></div>
      <p class="clamp">${job.prompt}</p>
      ${job.state === "failed" && job.error && html`<p class="told error">${job.error.message}${job.error.hint ? html` <span class="hint">${job.error.hint}</span>` : ""}</p>`}
      ${job.outputs.length > 0 && html`<div class="row minis">${job.outputs.slice(0, 6).map((output) => html`<button type="button" class="cell mini" key=${output.id} onClick=${() => show(output)}>
        <img src=${output.thumbnail_url} alt=${t.pictureAlt(output.seed)} loading="lazy" /></button>`)}</div>`}
    </li>`)}</ul>
    ${next && html`<${Button} class="more" onClick=${() => ask(next)}>${t.more}<//>`}`;
}
