// What scripts add to the strips of slices: one slice large, colours, class filter, marks and their export.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("cases-data").textContent);
  const section = document.getElementById("cases");
  const articles = [...section.querySelectorAll("article.case")];
  const bar = document.getElementById("bar"); // it covers what scrolls below it
  const overlay = document.getElementById("overlay");
  const colours = document.getElementById("colours");
  const classes = document.getElementById("class");
  const marked = document.getElementById("marked");
  let current = 0;
  let plane = 0;

  // -- colours: a strip's labels are a PNG whose palette says what each code looks like; another look is another palette.

  const crcTable = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });

  function crc(bytes) {
    let value = 0xffffffff;
    for (const byte of bytes) value = crcTable[(value ^ byte) & 255] ^ (value >>> 8);
    return (value ^ 0xffffffff) >>> 0;
  }

  function look([reference, prediction]) {
    const chosen = classes.value === "" ? null : Number(classes.value);
    const counts = (value) => value !== 0 && (chosen === null || value === chosen);
    const seen = { prediction, reference }[colours.value];
    if (seen !== undefined) return counts(seen) ? data.palette.classes[seen] : null;
    if (reference === prediction) return counts(reference) ? data.palette.hit : null;
    if (counts(reference) && counts(prediction)) return data.palette.wrong;
    if (counts(reference)) return data.palette.missed;
    return counts(prediction) ? data.palette.added : null;
  }

  function paletteOf(codes) {
    const rgba = [[0, 0, 0, 0]];
    for (const code of codes) {
      const colour = look(code) ?? "#00000000";
      rgba.push([1, 3, 5, 7].map((at) => parseInt(colour.slice(at, at + 2), 16)));
    }
    return rgba;
  }

  function repaint(address, rgba) {
    const bytes = Uint8Array.from(atob(address.slice(address.indexOf(",") + 1)), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    for (let at = 8; at < bytes.length; ) {
      const length = view.getUint32(at);
      const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
      const content = bytes.subarray(at + 8, at + 8 + length);
      if (kind === "PLTE") rgba.forEach((c, n) => content.set(c.slice(0, 3), 3 * n));
      if (kind === "tRNS") rgba.forEach((c, n) => (content[n] = c[3]));
      if (kind === "PLTE" || kind === "tRNS") view.setUint32(at + 8 + length, crc(bytes.subarray(at + 4, at + 8 + length)));
      at += 12 + length;
    }
    return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  }

  let looks = 0; // counts changes of colours and class
  function paint(index) {
    const article = articles[index];
    const wanted = `${looks}`;
    if (article.dataset.look === wanted) return;
    article.dataset.look = wanted;
    const rgba = paletteOf(data.cases[index].codes);
    for (const strip of article.querySelectorAll(".strip")) {
      const film = strip.querySelector(".labels");
      film.dataset.original ??= film.getAttribute("src");
      const address = repaint(film.dataset.original, rgba);
      const images = article.querySelectorAll(`[data-plane="${strip.dataset.plane}"] .labels`);
      for (const image of images) {
        if (image.src.startsWith("blob:") && image === film) URL.revokeObjectURL(image.src);
        image.src = address;
      }
    }
  }

  function repaintAll() {
    looks += 1;
    for (const shown of section.querySelectorAll(".of-errors")) shown.hidden = colours.value !== "errors";
    for (const shown of section.querySelectorAll(".of-classes")) shown.hidden = colours.value === "errors";
    articles.forEach((article, index) => article.dataset.near === "yes" && paint(index));
  }

  // -- one slice of each plane, large

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function build(index) {
    const article = articles[index];
    const windows = article.querySelector(".windows");
    const planes = data.cases[index].planes;
    if (windows.childElementCount || article.classList.contains("small")) return;
    windows.hidden = planes.length === 0;
    planes.forEach((entry, number) => {
      const strip = article.querySelector(`.strip[data-plane="${number}"]`);
      const film = strip.querySelector(".film");
      const images = [...film.querySelectorAll("img")].map((from) => {
        const image = element("img", { src: from.src, className: from.className, alt: "" });
        image.style.width = `${100 * entry.numbers.length}%`;
        return image;
      });
      const view = element("div", { className: "view" }, ...images, element("span", { className: "number" }));
      view.style.aspectRatio = `${entry.ratio}`;
      if (entry.side) view.append(element("span", { className: "side", textContent: entry.side }));
      const last = entry.numbers.length - 1;
      const slider = element("input", { type: "range", min: 0, max: last, value: entry.start });
      slider.setAttribute("aria-label", `${entry.name} slice of ${data.cases[index].name}`);
      const shown = element("div", { className: "window" }, view, slider);
      shown.dataset.plane = number;
      shown.style.flex = `${entry.ratio} 1 0`;
      shown.style.maxWidth = `${Math.round(340 * entry.ratio) + 10}px`;
      windows.append(shown);
      film.append(element("div", { className: "here" }));
      slider.addEventListener("input", () => { choose(index, number); show(index, number); });
      view.addEventListener("click", () => choose(index, number));
      view.addEventListener("wheel", (event) => {
        if (!event.shiftKey) return; // the page scrolls
        event.preventDefault();
        step(index, number, Math.sign(event.deltaY || event.deltaX));
      }, { passive: false });
      film.addEventListener("click", (event) => {
        const width = film.querySelector("img").getBoundingClientRect();
        slider.value = Math.floor(((event.clientX - width.left) / width.width) * entry.numbers.length);
        choose(index, number);
        show(index, number);
      });
      show(index, number);
    });
    delete article.dataset.look;
  }

  function show(index, number) {
    const shown = articles[index].querySelectorAll(".window")[number];
    const entry = data.cases[index].planes[number];
    const at = Number(shown.querySelector("input").value);
    for (const image of shown.querySelectorAll("img")) image.style.left = `${-100 * at}%`;
    shown.querySelector(".number").textContent = `${entry.name}, ${entry.numbers[at]}`;
    articles[index].querySelector(`.strip[data-plane="${number}"] .here`).style.setProperty("--at", at);
  }

  function step(index, number, by) {
    const slider = articles[index].querySelectorAll(".window input")[number];
    if (!slider) return;
    slider.value = Number(slider.value) + by;
    show(index, number);
  }

  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const index = Number(entry.target.dataset.index);
        entry.target.dataset.near = entry.isIntersecting ? "yes" : "no";
        if (!entry.isIntersecting) continue;
        build(index);
        paint(index);
      }
    },
    { rootMargin: "600px" },
  );

  // -- which case

  function choose(index, number = plane) {
    current = index;
    plane = Math.min(number, Math.max(0, data.cases[index].planes.length - 1));
    articles.forEach((article, other) => article.classList.toggle("current", other === current));
    articles[index].querySelectorAll(".window").forEach((one, other) => one.classList.toggle("active", other === plane));
  }

  const inView = (article) => {
    const box = article.getBoundingClientRect();
    return !article.hidden && box.bottom > bar.offsetHeight + 60 && box.top < innerHeight - 60;
  };

  // Keys act on what is seen: whoever has scrolled away from the chosen case means the first that is in view.
  function caseInView() {
    if (inView(articles[current])) return current;
    const first = articles.findIndex(inView);
    if (first >= 0) choose(first);
    return first;
  }

  function move(by) {
    const start = caseInView();
    const from = start < 0 ? current : start;
    for (let index = from + by; index >= 0 && index < articles.length; index += by) {
      if (articles[index].hidden) continue;
      build(index);
      choose(index);
      articles[index].scrollIntoView({ block: "start" });
      articles[index].focus({ preventScroll: true });
      return;
    }
  }

  // -- marks

  const place = `nnssl_adapt report ${data.key}`;
  let marks = {};
  try {
    marks = JSON.parse(localStorage.getItem(place)) ?? {};
  } catch {
    marks = {}; // a browser that keeps nothing for pages on disk, or a damaged entry
  }
  const idOf = (entry) => `${entry.fold}/${entry.name}`;
  const markOf = (entry) => (["pass", "fail", "artifact"].includes(marks[idOf(entry)]) ? marks[idOf(entry)] : "");

  function mark(index, what) {
    const id = idOf(data.cases[index]);
    if (what === "" || marks[id] === what) delete marks[id];
    else marks[id] = what;
    try {
      localStorage.setItem(place, JSON.stringify(marks));
    } catch {
      // as above: the marks last as long as the page
    }
    choose(index);
    showMarks();
  }

  function showMarks() {
    const counts = { pass: 0, fail: 0, artifact: 0 };
    data.cases.forEach((entry, index) => {
      const made = markOf(entry);
      if (made) counts[made] += 1;
      articles[index].dataset.mark = made;
      for (const button of articles[index].querySelectorAll("[data-mark]"))
        button.setAttribute("aria-pressed", String(button.dataset.mark === made));
      articles[index].hidden = marked.value !== "" && (made || "none") !== marked.value;
    });
    const words = Object.entries(counts).map(([name, count]) => `${count} ${name}`);
    document.getElementById("counts").textContent = `${words.join(" · ")}, of ${articles.length}`;
  }

  // Plain where YAML reads it as it stands; else as JSON, which is YAML too.
  const yaml = (text) => (/^[A-Za-z][\w.-]*\.[A-Za-z]+$/.test(text) ? text : JSON.stringify(text));
  const csv = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function exported(what) {
    if (what === "csv") {
      const rows = data.cases.map((entry) => [entry.name, entry.fold, entry.file, entry.dice, markOf(entry)]);
      return [["case", "fold", "image", "mean_dice", "mark"], ...rows].map((row) => row.map(csv).join(",") + "\r\n").join("");
    }
    const files = data.cases.filter((entry) => markOf(entry) === what).map((entry) => `- ${yaml(entry.file)}\n`);
    return files.length ? `FILES_SEG:\n${files.join("")}` : "FILES_SEG: []\n";
  }

  function save(what) {
    const [name, kind] = what === "csv" ? ["marks.csv", "text/csv"] : [`qc_${what}.yml`, "application/yaml"];
    const address = URL.createObjectURL(new Blob([exported(what)], { type: `${kind};charset=utf-8` }));
    const link = element("a", { href: address, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  // -- keys and clicks

  function next(select) {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    repaintAll();
  }

  function help() {
    const shown = document.getElementById("help");
    shown.hidden = !shown.hidden;
    document.getElementById("help-button").setAttribute("aria-expanded", String(!shown.hidden));
  }

  const anywhere = {
    o: () => { overlay.checked = !overlay.checked; },
    e: () => next(colours),
    c: () => next(classes),
    j: () => move(1),
    k: () => move(-1),
    "?": help,
  };
  const onCase = {
    p: (index) => mark(index, "pass"),
    f: (index) => mark(index, "fail"),
    a: (index) => mark(index, "artifact"),
    u: (index) => mark(index, ""),
    1: (index) => choose(index, 0),
    2: (index) => choose(index, 1),
    3: (index) => choose(index, 2),
    ArrowLeft: (index) => step(index, plane, -1),
    ArrowRight: (index) => step(index, plane, 1),
    v: (index) => document.dispatchEvent(new CustomEvent("volumes", { detail: index })),
  };

  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest?.("select, dialog")) return;
    if (target.type === "range" && event.key.startsWith("Arrow")) return; // the slider moves by itself
    if (Object.hasOwn(anywhere, event.key)) {
      anywhere[event.key]();
    } else if (Object.hasOwn(onCase, event.key)) {
      const index = caseInView();
      if (index < 0) return;
      onCase[event.key](index);
    } else return;
    event.preventDefault();
  });

  for (const select of [colours, classes]) select.addEventListener("change", () => { repaintAll(); select.blur(); });
  marked.addEventListener("change", () => { showMarks(); marked.blur(); });
  document.getElementById("help-button").addEventListener("click", help);
  for (const button of section.querySelectorAll("[data-export]"))
    button.addEventListener("click", () => save(button.dataset.export));
  articles.forEach((article, index) => {
    article.addEventListener("pointerdown", () => choose(index));
    for (const button of article.querySelectorAll("button[data-mark]"))
      button.addEventListener("click", () => mark(index, button.dataset.mark));
    article.querySelector(".open-volumes")?.addEventListener("click", () => onCase.v(index));
    near.observe(article);
  });

  section.classList.add("js-on");
  new ResizeObserver(() => section.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar);
  for (const hidden of section.querySelectorAll(".js")) hidden.hidden = false;
  showMarks();
  choose(0);
})();
