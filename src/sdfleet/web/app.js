// The frame around both pages: which one is shown, sign-in, the theme, and whether the server is there.

import { call, connection } from "./api.js";
import { text } from "./text.js";
import { Button, Dialog, Fault, Field, Icon, Toasts, createStore, html, render, toast, useEffect, useRef, useState, useStore } from "./ui.js";

const PAGES = { studio: () => import("./studio.js"), dashboard: () => import("./dashboard.js") };

/** Who is at this page: {needs_key, signed_in, name, scopes}; null until the server has said it. */
export const session = createStore({ who: null });

/** Whether the caller may do something: "generate", "read", "manage", "unfiltered". */
export const may = (scope) => session.get().who?.scopes.includes(scope) ?? false;

async function look() {
  try {
    const who = await call("/session");
    session.set({ who });
    connection.set({ wantsKey: who.needs_key && !who.signed_in });
  } catch {
    // Said by the line at the top; looked at again when the server is back.
  }
}

function pageOf(path) {
  return path.startsWith("/dashboard") ? "dashboard" : "studio";
}

function App() {
  const [page, setPage] = useState(pageOf(location.pathname));
  const [View, setView] = useState(null);
  const { isLost, wantsKey } = useStore(connection);
  const { who } = useStore(session);

  useEffect(() => {
    const onPop = () => setPage(pageOf(location.pathname));
    addEventListener("popstate", onPop);
    return () => removeEventListener("popstate", onPop);
  }, []);

  useEffect(() => {
    document.title = text.title(page);
    withStyle(page);
    PAGES[page]().then((module) => setView(() => module.default));
  }, [page]);

  // While the server is away, ask whether it is back; what the pages show heals by itself then.
  useEffect(() => {
    if (!isLost) { look(); return undefined; }
    const timer = setInterval(look, 2000);
    return () => clearInterval(timer);
  }, [isLost]);

  const go = (event, path) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
    event.preventDefault();
    if (pageOf(path) === page) return;
    history.pushState(null, "", path);
    setView(null);
    setPage(pageOf(path));
  };

  return html`
    <a class="skip" href="#main">${text.skip}</a>
    <header class="top">
      <a class="brand" aria-label="sdfleet" href="/studio" onClick=${(event) => go(event, "/studio")}><${Logo} /><span>sdfleet</span></a>
      <nav aria-label=${text.pages}>
        ${["studio", "dashboard"].map((name) => html`<a key=${name} href=${`/${name}`} aria-current=${page === name ? "page" : null}
          onClick=${(event) => go(event, `/${name}`)}>${text.pageNames[name]}</a>`)}
      </nav>
      <div class="top-end"><${Theme} />${who?.signed_in && html`<${SignedIn} who=${who} />`}</div>
    </header>
    ${isLost && html`<div class="banner" role="alert"><${Icon} name="warn" /><span>${text.lost} ${text.lostTrying}</span></div>`}
    <main id="main" class=${page} tabindex="-1">
      ${who && !wantsKey && View ? html`<${View} />` : !wantsKey && html`<p class="loading" aria-busy="true">${text.loading}</p>`}
    </main>
    ${wantsKey && html`<${SignIn} />`}
    <${Toasts} />`;
}

/** Styles of a page that was not the first one come with it. */
function withStyle(page) {
  const href = new URL(`./${page}.css`, import.meta.url).href;
  if ([...document.styleSheets].some((sheet) => sheet.href === href)) return;
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = href;
  document.head.append(link);
}

function Logo() {
  return html`<img class="logo" src=${new URL("./icon.svg", import.meta.url).href} alt="" width="26" height="26" />`;
}

const THEMES = ["auto", "light", "dark"];

function Theme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? "auto");
  const change = () => {
    const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("theme", next);
    } catch {
      // Not kept then; it still holds until the page is closed.
    }
    setTheme(next);
  };
  return html`<${Button} kind="quiet" icon=${{ auto: "half", light: "sun", dark: "moon" }[theme]} label=${text.theme(theme)} onClick=${change} />`;
}

function SignedIn({ who }) {
  const leave = async () => {
    await call("/session", { method: "DELETE" }).catch(() => {});
    await look();
  };
  return html`<span class="who" title=${who.scopes.join(", ")}><${Icon} name="key" />${who.name}</span>
    <${Button} kind="quiet" onClick=${leave}>${text.signOut}<//>`;
}

function SignIn() {
  const [key, setKey] = useState("");
  const [error, setError] = useState(null);
  const [isBusy, setBusy] = useState(false);
  const first = useRef(null);
  useEffect(() => first.current?.focus(), []);
  const enter = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await call("/session", { method: "POST", body: { key } });
      await look();
      toast(text.signedIn, { kind: "good" });
    } catch (fault) {
      setError(fault);
    }
    setBusy(false);
  };
  return html`<section class="sign-in card" aria-labelledby="sign-in-title">
    <${Logo} /><h1 id="sign-in-title">${text.signInTitle}</h1><p>${text.signInWhy}</p>
    <form onSubmit=${enter}>
      <${Field} label=${text.key}>${(ids) => html`<input ...${ids} ref=${first} class="input" type="password" autocomplete="current-password"
        required value=${key} onInput=${(event) => setKey(event.target.value)} />`}<//>
      ${error && html`<${Fault} error=${error} />`}
      <button class="button primary" type="submit" disabled=${isBusy || !key}>${text.signIn}</button>
    </form>
  </section>`;
}

render(html`<${App} />`, document.getElementById("app"));
