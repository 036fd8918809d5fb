// The studio: ask for pictures on the left, watch them in the middle, find all of them on the right.

import { useEffect, html, useStore } from "./ui.js";
import { follow, studio } from "./studio_state.js";
import { Form } from "./studio_form.js";
import { Stage } from "./studio_stage.js";
import { Gallery } from "./studio_gallery.js";
import { Dialogs } from "./studio_dialogs.js";

export default function Studio() {
  useEffect(follow, []);
  const dialog = useStore(studio, (state) => state.dialog);
  return html`<div class="studio-grid"><${Form} /><${Stage} /><${Gallery} /></div>
    ${dialog && html`<${Dialogs} dialog=${dialog} />`}`;
}
