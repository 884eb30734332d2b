// Shows the text that a QuantPress node reports (what was quantized, saved, found) in a read-only box on the node.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const PREFIX = "QuantPress";
const WIDGET = "report";
const PROGRESS = "$$node-text-preview"; // where the frontend shows progress text

function reportWidget(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found;
  const { widget } = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app);
  widget.serialize = false; // of this run only: a saved workflow stays small and says nothing stale
  widget.options.serialize = false;
  widget.options.read_only = true;
  if (widget.inputEl) {
    widget.inputEl.readOnly = true;
    widget.inputEl.style.fontFamily = "monospace";
    widget.inputEl.style.whiteSpace = "pre";
  }
  return widget;
}

function show(node, text) {
  const progress = node.widgets?.find((widget) => widget.name === PROGRESS);
  if (progress) node.removeWidget(progress); // the report replaces it; the next run brings it back
  const widget = reportWidget(node);
  widget.value = text;
  const lines = text.split("\n");
  const longest = Math.max(...lines.map((line) => line.length));
  const [width, height] = node.computeSize();
  node.setSize([
    Math.max(node.size[0], Math.min(760, width, 40 + longest * 6.5)),
    Math.max(node.size[1], height + Math.min(240, 14 * lines.length)),
  ]);
  app.graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "QuantPress.ReportText",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      const text = output?.text;
      if (text) show(this, Array.isArray(text) ? text.join("\n") : String(text));
    };
  },
});
