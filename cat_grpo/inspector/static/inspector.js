// Handles keys, sends reviews without a new page, and shows the values under the pointer.
// Every page also works without this script.
"use strict";

const one = (selector) => document.querySelector(selector);

// Moves to the next or previous row of a table, or follows the page's own next or previous link.
function move(by) {
  const rows = [...document.querySelectorAll("a[data-row]")];
  const link = one(by > 0 ? 'a[rel="next"]' : 'a[rel="prev"]');
  if (!rows.length) {
    if (link) link.click();
    return;
  }
  const at = rows.indexOf(document.activeElement);
  const next = at < 0 ? (by > 0 ? 0 : rows.length - 1) : at + by;
  if (rows[next]) rows[next].focus();
  else if (link) link.click();
}

const opinions = { r: "right", w: "wrong", u: "unsure" };

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, dialog[open]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Escape" && typing) event.target.blur();
    return;
  }
  const button = opinions[event.key] && one(`.review button[value="${opinions[event.key]}"]`);
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "?") one("#keys").showModal();
  else if (event.key === "/" && one("#q")) one("#q").select();
  else if (button) button.click();
  else return;
  event.preventDefault();
});

one("#show-keys").addEventListener("click", () => one("#keys").showModal());

const form = one("form.review");
if (form) {
  const remembered = "cat-grpo reviewer";
  form.elements.name.value = localStorage.getItem(remembered) || "";
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    review(event.submitter.value);
  });

  async function review(opinion) {
    const name = form.elements.name.value.trim();
    const status = form.querySelector(".status");
    localStorage.setItem(remembered, name);
    status.textContent = "…";
    const answer = await fetch(form.action, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Cat-Grpo": "review" },
      body: JSON.stringify({ name, opinion, note: form.elements.note.value }),
    }).catch(() => null);
    if (!answer || !answer.ok) {
      status.textContent = "The review was not saved. Is the inspector still running?";
      return;
    }
    for (const [scope, text] of Object.entries(await answer.json()))
      for (const place of document.querySelectorAll(`[data-accuracy="${scope}"]`)) place.textContent = text;
    for (const button of form.querySelectorAll("button.opinion"))
      button.setAttribute("aria-pressed", String(button.value === opinion));
    form.elements.note.value = "";
    status.textContent = `Marked ${opinion} by ${name}.`;
  }
}

// A review needs a name. When it is missing, the key leads to its field.
document.addEventListener("invalid", (event) => event.target.focus(), true);

const figure = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3)));

for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const curves = JSON.parse(svg.dataset.curves);
  const cursor = svg.querySelector(".cursor");
  const readout = svg.closest("figure").querySelector(".readout");
  const empty = readout.textContent;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const near = (points) => points.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a));
    const step = near(curves.flatMap((curve) => curve.points))[0];
    const values = curves.flatMap((curve) => curve.points.filter((point) => point[0] === step).map((point) => [curve.label, point]));
    cursor.setAttribute("x1", values[0][1][2]);
    cursor.setAttribute("x2", values[0][1][2]);
    cursor.classList.add("on");
    readout.textContent = `Step ${step}: ` + values.map(([label, point]) => `${label} ${figure(point[1])}`).join(" · ");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.classList.remove("on");
    readout.textContent = empty;
  });
}
