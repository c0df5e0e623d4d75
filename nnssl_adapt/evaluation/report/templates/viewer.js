// The volumes of the case that is asked for (key v), by NiiVue.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("cases-data").textContent);
  const dialog = document.getElementById("viewer");
  const state = document.getElementById("viewer-state");
  const view = dialog.querySelector("select");
  const opacity = dialog.querySelector("input[type=range]");
  const boxes = [...dialog.querySelectorAll("input[type=checkbox]")];
  let scene = null; // made when it is first needed: a WebGL context is not for nothing
  let order = []; // which volume of the scene is what

  function lookup() {
    const entries = Object.entries(data.palette.classes).map(([value, colour]) => [Number(value), colour]);
    const part = (at) => entries.map(([, colour]) => parseInt(colour.slice(at, at + 2), 16));
    return {
      R: [0, ...part(1)], G: [0, ...part(3)], B: [0, ...part(5)], A: [0, ...entries.map(() => 255)],
      I: [0, ...entries.map(([value]) => value)],
      labels: ["", ...entries.map(([value]) => data.classes[value] ?? `${value}`)],
    };
  }

  function apply() {
    if (!scene) return;
    order.forEach((what, number) => {
      if (what === "image") return;
      const shown = boxes.find((box) => box.value === what).checked;
      scene.setOpacity(number, shown ? Number(opacity.value) / 100 : 0);
    });
    scene.setSliceType(Number(view.value));
  }

  async function open(index) {
    const image = document.getElementById(`volume-${index}-image`);
    if (!image) return;
    dialog.querySelector("h3").textContent = data.cases[index].name;
    dialog.dataset.shown = "";
    state.textContent = "loading …";
    if (!dialog.open) dialog.showModal();
    try {
      if (!scene) {
        scene = new niivue.Niivue({ show3Dcrosshair: true, backColor: [0.07, 0.07, 0.07, 1], dragAndDropEnabled: false, isRadiologicalConvention: true, multiplanarShowRender: 1, logLevel: "error" });
        await scene.attachToCanvas(dialog.querySelector("canvas"));
      }
      for (const volume of [...scene.volumes]) scene.removeVolume(volume);
      order = [];
      for (const what of ["image", "reference", "prediction"]) {
        const text = document.getElementById(`volume-${index}-${what}`).textContent;
        const volume = await niivue.NVImage.loadFromBase64({ base64: text, name: `${what}.nii.gz`, colormap: "gray", colorbarVisible: false });
        if (what !== "image") volume.setColormapLabel(lookup());
        scene.addVolume(volume);
        order.push(what);
      }
      apply();
      state.textContent = "";
      dialog.dataset.shown = String(index);
    } catch (error) {
      state.textContent = `The volumes can't be shown: ${error.message}. NiiVue needs WebGL 2.`;
    }
  }

  document.addEventListener("volumes", (event) => open(event.detail));
  for (const control of [...boxes, opacity, view]) control.addEventListener("input", apply);
})();
