// Nodes whose report is a list of layers start wider than the frontend makes them, so that layer names do not wrap.
import { app } from "../../../scripts/app.js";

const WIDTH = 400;
const WIDE = new Set(["QuantPressInspect", "QuantPressOpenFile", "QuantPressRepair", "QuantPressMigrate", "QuantPressEditMetadata",
  "QuantPressInputScales"]);

app.registerExtension({
  name: "QuantPress.NodeWidth",
  nodeCreated(node) {
    // A saved workflow sets its own size afterwards.
    if (WIDE.has(node.comfyClass)) node.setSize([Math.max(WIDTH, node.size[0]), node.size[1]]);
  },
});
