// Shows the text that a QuantPress node reports (what was quantized, saved, found, or why it failed) in a read-only box on
// the node. The frontend alone shows a failure as "threw an error" until one asks for details.
import { api } from "../../../scripts/api.js";
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
  }
  return widget;
}

function show(node, text) {
  const progress = node.widgets?.find((widget) => widget.name === PROGRESS);
  if (progress) node.removeWidget(progress); // the report replaces it; the next run brings it back
  const widget = reportWidget(node);
  widget.value = text;
  // The width stays the user's: what is longer wraps.
  const room = Math.max(20, (node.size[0] - 30) / 6);
  if (widget.inputEl) widget.inputEl.style.whiteSpace = "pre-wrap";
  const lines = text.split("\n").reduce((sum, line) => sum + Math.ceil((line.length + 1) / room), 0);
  const height = node.computeSize()[1] + Math.min(240, 14 * lines);
  if (height > node.size[1]) node.setSize([node.size[0], height]);
  app.graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "QuantPress.ReportText",
  setup() {
    api.addEventListener("execution_error", ({ detail }) => {
      const node = app.graph.getNodeById(detail.node_id);
      if (node?.comfyClass?.startsWith(PREFIX)) show(node, `${detail.exception_message}`.trim());
    });
  },
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
