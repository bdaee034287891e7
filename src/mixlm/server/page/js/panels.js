// The list of conversations and the settings. Where the page is narrow they lie over it, one at a time.

import { $ } from "./dom.js";

const PANELS = ["list", "settings"];
const isNarrow = () => matchMedia("(max-width: 60rem)").matches;
const isShown = (name) => document.body.classList.contains(`show-${name}`);

export const panels = {
  get areOver() {
    return isNarrow() && PANELS.some(isShown);
  },

  toggle(name, shown = !isShown(name)) {
    if (shown) this.close();
    document.body.classList.toggle(`show-${name}`, shown);
    if (name === "settings") $("#settings").hidden = !shown;
    $(`#toggle-${name}`).setAttribute("aria-expanded", shown);
    $("#backdrop").hidden = !this.areOver;
  },

  // Close what lies over the page.
  close() {
    if (isNarrow()) for (const name of PANELS.filter(isShown)) this.toggle(name, false);
  },

  listen() {
    for (const name of PANELS) $(`#toggle-${name}`).addEventListener("click", () => this.toggle(name));
    $("#close-settings").addEventListener("click", () => this.toggle("settings", false));
    $("#backdrop").addEventListener("click", () => this.close());
  },
};
