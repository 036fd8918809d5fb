// The parts that both pages are made of. `html` is Preact's createElement written as templates.

import { createElement, render } from "./vendor/preact.js";
import { useCallback, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";
import { text } from "./text.js";

export const html = htm.bind(createElement);
export { render, useCallback, useEffect, useId, useLayoutEffect, useMemo, useRef, useState };

/** A value that components share. `set` takes the fields that change. */
export function createStore(initial) {
  let value = initial;
  const readers = new Set();
  return {
    get: () => value,
    set(change) {
      value = { ...value, ...(typeof change === "function" ? change(value) : change) };
      for (const reader of [...readers]) reader(value);
    },
    subscribe(reader) {
      readers.add(reader);
      return () => readers.delete(reader);
    },
  };
}

/** The part of a store that a component shows; it is drawn again only when that part is another one. */
export function useStore(store, select = (value) => value) {
  const [shown, show] = useState(() => select(store.get()));
  useLayoutEffect(() => {
    const look = (value) => show(() => select(value));
    look(store.get());
    return store.subscribe(look);
  }, [store]);
  return shown;
}

const PATHS = {
  dice: "M4 4h16v16H4zM8.5 8.5h.01M15.5 8.5h.01M12 12h.01M8.5 15.5h.01M15.5 15.5h.01",
  lock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  unlock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 6.8-1.2",
  star: "m12 4 2.5 5.2 5.7.8-4.1 4 1 5.7-5.1-2.7-5.1 2.7 1-5.7-4.1-4 5.7-.8z",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  download: "M12 4v11M7.5 11l4.5 4.5 4.5-4.5M5 20h14",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  compare: "M4 5h16v14H4zM12 3v18M7 12h2M15 12h2",
  close: "M6 6l12 12M18 6 6 18",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 3v1.5M12 19.5V21M3 12h1.5M19.5 12H21M5.6 5.6l1 1M17.4 17.4l1 1M5.6 18.4l1-1M17.4 6.6l1-1",
  moon: "M19 14.5A7.5 7.5 0 0 1 9.5 5a7.5 7.5 0 1 0 9.5 9.5z",
  half: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  search: "M10.5 5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11M15 15l5 5",
  image: "M4 5h16v14H4zM4 16l4.5-4.5 4 4 2.5-2.5 5 5M15.5 9h.01",
  brush: "M19.5 4.5 10 14M9.5 13.5c-2 0-3 1.2-3 3s-1 2.5-2.5 2.5c1 1 5.5 1.5 7.5-.5 1.2-1.2 1-3.5-.5-4.5",
  wand: "M5 19 15 9M14 4v3M19 9h-3M18 5l-2 2M9 5l.5 1.500M19.5 14 18 13.5",
  left: "M14.5 6 8.5 12l6 6",
  right: "M9.5 6l6 6-6 6",
  key: "M14.5 5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9M11 12.5 4 19.500M6.5 17l2 2",
  check: "m5 12.5 4.5 4.500L19 7.5",
  warn: "M12 4 2.8 20h18.400zM12 10v4.500M12 17.300h.01",
  swap: "M7 4 3.5 7.5 7 11M3.5 7.500H20M17 13l3.5 3.500L17 20M20.5 16.500H4",
};

/** A small line drawing; decoration, unless it has a title. */
export function Icon({ name, title, filled = false }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden=${title ? null : "true"} role=${title ? "img" : null}
    aria-label=${title} fill=${filled ? "currentColor" : "none"} stroke="currentColor" stroke-width="1.7"
    stroke-linecap="round" stroke-linejoin="round"><path d=${PATHS[name]} /></svg>`;
}

/** A button. kind: "primary", "plain", "quiet" or "danger". With only an icon, `label` is what it is called. */
export function Button({ kind = "plain", icon, label, children, pressed, class: extra = "", filled = false, ...rest }) {
  return html`<button type="button" class=${`button ${kind} ${children ? "" : "icon-only"} ${extra}`} aria-label=${label}
    title=${label} aria-pressed=${pressed === undefined ? null : String(pressed)} ...${rest}>
    ${icon && html`<${Icon} name=${icon} filled=${filled} />`}${children && html`<span>${children}</span>`}</button>`;
}

/** A labelled control. children: a function of the ids that the control must carry. why: it is off, and that is why. */
export function Field({ label, hint, why, error, aside, id: own, class: extra = "", children }) {
  const made = useId();
  const id = own ?? made;
  const told = why || error || hint;
  return html`<div class=${`field ${error ? "has-error" : ""} ${extra}`}>
    <div class="field-head"><label for=${id}>${label}</label>${aside}</div>
    ${children({ id, "aria-describedby": told ? `${id}-told` : null, "aria-invalid": error ? "true" : null, disabled: !!why })}
    ${told && html`<p class=${error ? "told error" : "told"} id=${`${id}-told`}>${told}</p>`}
  </div>`;
}

/** A number to type. What is being typed stays as it is, whatever is drawn again meanwhile; onNumber(number or null). */
export function NumberInput({ value, onNumber, ...rest }) {
  const [draft, setDraft] = useState(null);
  const onInput = (event) => {
    const typed = event.target.value;
    setDraft(typed);
    onNumber(typed === "" ? null : Number(typed));
  };
  return html`<input ...${rest} class="input num" type="number" value=${draft ?? value ?? ""} onInput=${onInput} onBlur=${() => setDraft(null)} />`;
}

/** kind: "plain", "good", "warn", "bad" or "accent". */
export function Badge({ kind = "plain", children }) {
  return html`<span class=${`badge ${kind}`}>${children}</span>`;
}

/** How far something is, 0 to 1; without a share it says that it goes on. */
export function Progress({ share, label }) {
  return html`<progress class="progress" aria-label=${label} ...${share === undefined || share === null ? {} : { value: share, max: 1 }} />`;
}

/** A window over the page: Escape and the cross close it, the focus stays inside. */
export function Dialog({ title, onClose, children, foot, class: extra = "" }) {
  const ref = useRef(null);
  const id = useId();
  useEffect(() => {
    const dialog = ref.current;
    dialog.showModal();
    return () => dialog.open && dialog.close();
  }, []);
  // A press beside the window means "away with it"; one that began inside (a selection of text) does not.
  const pressed = useRef(false);
  return html`<dialog ref=${ref} class=${`dialog ${extra}`} aria-labelledby=${id}
    onCancel=${(event) => { event.preventDefault(); onClose(); }}
    onMouseDown=${(event) => { pressed.current = event.target === ref.current; }}
    onClick=${(event) => { if (event.target === ref.current && pressed.current) onClose(); }}>
    <div class="dialog-body">
      <header class="dialog-head"><h2 id=${id}>${title}</h2>
        <${Button} kind="quiet" icon="close" label=${text.close} onClick=${onClose} /></header>
      <div class="dialog-content">${children}</div>
      ${foot && html`<footer class="dialog-foot">${foot}</footer>`}
    </div>
  </dialog>`;
}

const toasts = createStore({ list: [] });
let nToasts = 0;

/** Tell something at the edge of the window. kind: "good", "bad" or "plain"; action: {label, run}. */
export function toast(message, { kind = "plain", hint = "", action = null, staysMs = kind === "bad" ? 12000 : 5000 } = {}) {
  const number = (nToasts += 1);
  const away = () => toasts.set(({ list }) => ({ list: list.filter((one) => one.number !== number) }));
  toasts.set(({ list }) => ({ list: [...list.slice(-3), { number, message, kind, hint, action, away }] }));
  setTimeout(away, staysMs);
}

/** Tell a fault: what happened, and what to do. */
export function toastError(error) {
  toast(error.message, { kind: "bad", hint: error.hint || "" });
}

/** Where toasts appear; once on a page. */
export function Toasts() {
  const { list } = useStore(toasts);
  return html`<div class="toasts" role="status" aria-live="polite">
    ${list.map((one) => html`<div class=${`toast ${one.kind}`} key=${one.number}>
      <div class="toast-text"><p>${one.message}</p>${one.hint && html`<p class="hint">${one.hint}</p>`}</div>
      ${one.action && html`<${Button} kind="quiet" onClick=${() => { one.away(); one.action.run(); }}>${one.action.label}<//>`}
      <${Button} kind="quiet" icon="close" label=${text.close} onClick=${one.away} />
    </div>`)}
  </div>`;
}

/** What went wrong, in its place, with the next action. */
export function Fault({ error, children }) {
  return html`<div class="fault" role="alert"><${Icon} name="warn" />
    <div><p>${error.message}</p>${error.hint && html`<p class="hint">${error.hint}</p>`}${children && html`<div class="fault-acts">${children}</div>`}</div>
  </div>`;
}

/** Copy text, and say so. */
export async function copyText(value, told = text.copied) {
  try {
    await navigator.clipboard.writeText(value);
  } catch {
    // Not a secure address (another machine over plain HTTP): the old way works there.
    const area = document.createElement("textarea");
    area.value = value;
    const home = document.querySelector("dialog[open]") || document.body;
    home.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(told, { kind: "good" });
}
