// Keeps the page up to date: asks for it again, and changes only what has changed, so that open
// details, the focus and a button that is just being pressed stay.
"use strict";

const EVERY_MS = 2000;
const live = document.getElementById("live");
const connection = document.getElementById("connection");
const format = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });

function localise(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    time.textContent = format.format(new Date(time.dateTime));
  }
}

function isSameKind(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName && one.id === other.id;
}

function update(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value && name !== "open") old.setAttribute(name, value);
  }
  updateChildren(old, fresh);
}

function updateChildren(old, fresh) {
  const coming = [...fresh.childNodes];
  const named = new Set(coming.map((node) => node.id).filter(Boolean));
  let place = old.firstChild;
  for (const node of coming) {
    while (place && place.id && !named.has(place.id)) {
      const gone = place;
      place = place.nextSibling;
      gone.remove();
    }
    if (place && isSameKind(place, node)) {
      update(place, node);
      place = place.nextSibling;
      continue;
    }
    const moved = node.id && [...old.children].find((child) => child.id === node.id);
    if (moved) {
      old.insertBefore(moved, place);
      update(moved, node);
    } else {
      old.insertBefore(document.adoptNode(node), place);
    }
  }
  while (place) {
    const gone = place;
    place = place.nextSibling;
    gone.remove();
  }
}

async function refresh() {
  const answer = await fetch(location.pathname, { headers: { Accept: "text/html" } });
  if (!answer.ok) throw new Error(answer.statusText);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  localise(page);
  update(live, page.getElementById("live"));
}

async function keepUpToDate() {
  if (!document.hidden) {
    try {
      await refresh();
      connection.textContent = "";
    } catch {
      connection.textContent = connection.dataset.lost;
    }
  }
  setTimeout(keepUpToDate, EVERY_MS);
}

localise(document);
setTimeout(keepUpToDate, EVERY_MS);
