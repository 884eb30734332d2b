// Makes example_workflows/: lays out each graph below in a real frontend, saves it, runs it from the page, takes its picture.
//   node make_examples.cjs PORT FOLDER [NAME]       (a ComfyUI with this pack on PORT; needs chromium and playwright-core)
const { chromium } = require('playwright-core');
const fs = require('fs'), os = require('os'), path = require('path');
const FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync'];

const MODEL = 'quantpress_demo_model.safetensors', VAE = 'quantpress_demo_vae.safetensors';
const recipe = (format) => ({ source: ['1', 0], format, group_size: 'automatic', scales: 'absmax', rounding: 'nearest', seed: 0,
  keep: '', only: '', fallback: 'keep in source dtype', device: 'auto' });
const sampler = (model, seed) => ({ model, positive: ['4', 0], negative: ['5', 0], latent_image: ['6', 0], seed, steps: 20, cfg: 3.0,
  sampler_name: 'euler', scheduler: 'simple', denoise: 1.0 });
const node = (class_type, inputs, at, size, title) => ({ class_type, inputs, at, size, title });

const EXAMPLES = {
  quantize_and_run: {
    nodes: {
      1: node('QuantPressLoadSource', { file: `diffusion_models/${MODEL}` }, [40, 110], [380, 190]),
      2: node('QuantPressQuantize', recipe('int8_convrot'), [450, 110], [440, 570]),
      3: node('QuantPressLoadQuantized', { quantized: ['2', 0] }, [920, 110], [300, 60]),
      4: node('QuantPressTestConditioning', { model: ['3', 0], kind: 'demo shapes', seed: 9 }, [920, 230], [300, 110], 'Positive (use your text encoder)'),
      5: node('QuantPressTestConditioning', { model: ['3', 0], kind: 'zeros', seed: 0 }, [920, 400], [300, 110], 'Negative'),
      6: node('EmptySD3LatentImage', { width: 128, height: 128, batch_size: 4 }, [920, 570], [300, 110]),
      7: node('KSampler', sampler(['3', 0], 9), [1250, 110], [300, 270]),
      8: node('VAELoader', { vae_name: VAE }, [1250, 450], [300, 60]),
      9: node('VAEDecode', { samples: ['7', 0], vae: ['8', 0] }, [1250, 580], [300, 50]),
      10: node('SaveImage', { images: ['9', 0], filename_prefix: 'QuantPress/quantized' }, [1580, 110], [440, 570]),
    },
    groups: [['Choose a model and a format', 20, 40, 885, 660, '#3f789e'], ['Run the quantized model; nothing is saved yet', 910, 40, 1130, 660, '#8A8']],
    note: [40, 350, 380, 330, `### Quantize a model and run it at once
Press **Run**: the demo model that comes with QuantPress is quantized and draws four pictures, without any download.

**Your own model:** choose it in *Load Model to Quantize*, choose its VAE, put your text encoder in place of the two *Test Conditioning* nodes, and set the size of the latent.

A new seed or prompt does not quantize again; a new format does. Add *Save Quantized Model* when you like what you see.`],
  },
  save_and_compare: {
    nodes: {
      11: node('UNETLoader', { unet_name: MODEL, weight_dtype: 'default' }, [40, 470], [380, 90], 'The original, 16 bits'),
      4: node('QuantPressTestConditioning', { model: ['11', 0], kind: 'demo shapes', seed: 8 }, [40, 620], [380, 110], 'Positive (use your text encoder)'),
      5: node('QuantPressTestConditioning', { model: ['11', 0], kind: 'zeros', seed: 0 }, [40, 790], [380, 110], 'Negative'),
      6: node('EmptySD3LatentImage', { width: 128, height: 128, batch_size: 1 }, [40, 960], [380, 110]),
      1: node('QuantPressLoadSource', { file: `diffusion_models/${MODEL}` }, [460, 110], [430, 190]),
      2: node('QuantPressQuantize', recipe('bnb_nf4'), [460, 350], [430, 720]),
      12: node('QuantPressSave', { quantized: ['2', 0], folder: 'diffusion_models', name: 'QuantPress/{model}-{format}', overwrite: true }, [920, 110], [430, 190]),
      3: node('UNETLoader', { unet_name: ['12', 0], weight_dtype: 'default' }, [920, 350], [430, 90], 'The saved file, by the stock loader'),
      8: node('VAELoader', { vae_name: VAE }, [920, 490], [430, 60]),
      13: node('QuantPressInspect', { file: '(the connected model)', quantized: ['2', 0] }, [920, 600], [430, 470]),
      7: node('KSampler', sampler(['11', 0], 8), [1390, 110], [300, 270], 'KSampler: original'),
      9: node('VAEDecode', { samples: ['7', 0], vae: ['8', 0] }, [1390, 450], [300, 50]),
      14: node('KSampler', sampler(['3', 0], 8), [1390, 600], [300, 270], 'KSampler: quantized'),
      15: node('VAEDecode', { samples: ['14', 0], vae: ['8', 0] }, [1390, 940], [300, 50]),
      10: node('PreviewImage', { images: ['9', 0] }, [1720, 110], [400, 440], 'Original'),
      16: node('PreviewImage', { images: ['15', 0] }, [1720, 600], [400, 470], 'Quantized'),
    },
    groups: [['The same for both', 20, 400, 415, 690, '#b58b2a'], ['Quantize, save, load again', 445, 40, 920, 1050, '#3f789e'],
      ['Same seed, same steps', 1375, 40, 765, 1050, '#8A8']],
    note: [40, 60, 380, 310, `### Save, load with the stock loader, compare
Press **Run**: the demo model is quantized to 4 bits (NF4), saved in *diffusion_models/QuantPress*, loaded by ComfyUI's own *Load Diffusion Model*, and both models draw from the same noise.

**Your own model:** choose it twice (below, and in *Load Model to Quantize*), its VAE, the latent's size, and your text encoder for *Test Conditioning*. Then try formats: the report shows size, error and the worst layers.`],
  },
  calibrate_and_quantize: {
    nodes: {
      11: node('UNETLoader', { unet_name: MODEL, weight_dtype: 'default' }, [40, 480], [380, 90], 'The original, 16 bits'),
      4: node('QuantPressTestConditioning', { model: ['11', 0], kind: 'demo shapes', seed: 8 }, [40, 630], [380, 110], 'Positive (use your text encoder)'),
      5: node('QuantPressTestConditioning', { model: ['11', 0], kind: 'zeros', seed: 0 }, [40, 800], [380, 110], 'Negative'),
      6: node('EmptySD3LatentImage', { width: 128, height: 128, batch_size: 1 }, [40, 970], [380, 110]),
      20: node('QuantPressCapture', { model: ['11', 0], runs: 'accumulate', hessians: true, device_gb: 0, ram_gb: 16, rows_per_step: 128, layers: '', seed: 0, calls: 64 }, [460, 110], [330, 270]),
      21: node('KSampler', sampler(['20', 0], 100), [460, 450], [330, 270], 'KSampler: this run is recorded'),
      22: node('QuantPressCollect', { latent: ['21', 0], capture: ['20', 1] }, [460, 790], [330, 340]),
      23: node('QuantPressSaveCalibration', { calibration: ['22', 0], name: 'quantpress_demo', overwrite: true }, [830, 1040], [400, 180]),
      1: node('QuantPressLoadSource', { file: `diffusion_models/${MODEL}` }, [830, 110], [400, 190]),
      2: node('QuantPressQuantize', { ...recipe('nvfp4'), scales: 'auto', rounding: 'auto', calibration: ['22', 0], bias_correction: true, input_scales: false }, [830, 340], [400, 650]),
      3: node('QuantPressLoadQuantized', { quantized: ['2', 0] }, [1280, 510], [300, 60]),
      7: node('KSampler', sampler(['11', 0], 8), [1280, 110], [300, 270], 'KSampler: original'),
      14: node('KSampler', sampler(['3', 0], 8), [1280, 630], [300, 270], 'KSampler: quantized'),
      8: node('VAELoader', { vae_name: VAE }, [1280, 970], [300, 60]),
      9: node('VAEDecode', { samples: ['7', 0], vae: ['8', 0] }, [1280, 430], [300, 50]),
      15: node('VAEDecode', { samples: ['14', 0], vae: ['8', 0] }, [1280, 1080], [300, 50]),
      10: node('PreviewImage', { images: ['9', 0] }, [1620, 110], [400, 460], 'Original'),
      16: node('PreviewImage', { images: ['15', 0] }, [1620, 630], [400, 500], 'Quantized with the calibration'),
    },
    groups: [['1. Draw as usual, and record', 445, 40, 360, 1220, '#b58b2a'], ['2. Quantize by what was recorded', 815, 40, 430, 1220, '#3f789e'],
      ['3. The same seed with both', 1265, 40, 770, 1220, '#8A8']],
    note: [40, 60, 380, 340, `### Calibrate, quantize, compare
Press **Run**: the demo model draws one picture while *Capture Activations* watches, the record becomes a calibration, and the model is quantized to 4 bits (NVFP4) with it.

**Your own model:** choose it twice, connect your text encoder, set the size of the latent. Then change the prompt and press **Run** again, ten to twenty times: the record accumulates, and every run quantizes with more. (Bypass the groups 2 and 3 until the last run to save time.) With twenty prompts recorded, connect the original model to *Quantize Model* too: every layer then also makes up for those before it.

The saved calibration is in *models/calibrations*.`],
  },
  repair_and_inspect: {
    nodes: {
      1: node('QuantPressLoadSource', { file: `diffusion_models/${MODEL}` }, [40, 110], [380, 190]),
      20: node('QuantPressOpenFile', { file: `diffusion_models/${MODEL}` }, [40, 350], [380, 110], 'Your own file: connect this to Repair'),
      2: node('QuantPressQuantize', recipe('float8_e4m3fn'), [460, 110], [420, 640]),
      21: node('QuantPressEditMetadata', { quantized: ['2', 0], add: '', remove: 'format', layers: 'x_block', header: 'update', force: true, preview: false },
        [460, 800], [420, 400], 'Spoil it: half of the layers lose their format'),
      22: node('QuantPressRepair', { quantized: ['21', 0], only_diagnose: false, assume: 'automatic', unswizzled: false, mode: 'repair', marker: '0',
        add_scale_input: false, keep_shapes: false }, [920, 110], [470, 560]),
      13: node('QuantPressInspect', { file: '(the connected model)', quantized: ['22', 0] }, [920, 720], [470, 480]),
      12: node('QuantPressSave', { quantized: ['22', 0], folder: 'diffusion_models', name: 'QuantPress/{model}-repaired', overwrite: true }, [1430, 110], [330, 190]),
      3: node('QuantPressLoadQuantized', { quantized: ['22', 0] }, [1430, 350], [330, 60]),
      4: node('QuantPressTestConditioning', { model: ['3', 0], kind: 'demo shapes', seed: 8 }, [1430, 470], [330, 110], 'Positive (use your text encoder)'),
      5: node('QuantPressTestConditioning', { model: ['3', 0], kind: 'zeros', seed: 0 }, [1430, 640], [330, 110], 'Negative'),
      6: node('EmptySD3LatentImage', { width: 128, height: 128, batch_size: 1 }, [1430, 810], [330, 110]),
      7: node('KSampler', sampler(['3', 0], 8), [1800, 110], [330, 270]),
      8: node('VAELoader', { vae_name: VAE }, [1800, 450], [330, 60]),
      9: node('VAEDecode', { samples: ['7', 0], vae: ['8', 0] }, [1800, 570], [330, 50]),
      10: node('PreviewImage', { images: ['9', 0] }, [1800, 690], [330, 440], 'The repaired model'),
    },
    groups: [['1. A broken file, to practise on', 20, 40, 875, 1180, '#b58b2a'],
      ['2. What is wrong, what it is now', 905, 40, 500, 1180, '#3f789e'], ['3. It loads and draws again', 1415, 40, 735, 1180, '#8A8']],
    note: [40, 510, 380, 400, `### Repair and inspect
Press **Run**: the demo model is quantized to FP8, and *Edit Metadata* is forced to spoil it: more than half of the layers no longer say what they are, so ComfyUI could not load it. *Repair* names what is wrong, finds the format from the tensors, and writes a sound file.

**Your own file** that does not load, or makes noise: choose it in *Open Quantized File*, connect that to *Repair*, and delete the other nodes of part 1. With *only_diagnose* on, nothing is written. Older forms (fp8_scaled, bitsandbytes) take *Migrate Legacy File* in place of *Repair*.`],
  },
};

const plain = (nodes) => Object.fromEntries(Object.entries(nodes).map(([id, n]) => [id, { class_type: n.class_type, inputs: n.inputs, _meta: { title: n.title } }]));

async function layOut(page, example) {
  await page.evaluate(async ({ api, example }) => {
    const app = window.app, LiteGraph = window.LiteGraph;
    await app.loadApiJson(api, 'example');
    for (const [id, spec] of Object.entries(example.nodes)) {
      const node = app.graph.getNodeById(Number(id)) || app.graph.getNodeById(id);
      node.pos = spec.at; node.setSize(spec.size);
      if (spec.title) node.title = spec.title;
      const control = node.widgets?.find((w) => w.name === 'control_after_generate' || w.name === 'control after generate');
      if (control) control.value = 'fixed';
      const seed = node.widgets?.find((w) => w.name === 'seed');
      if (seed) seed.value = spec.inputs.seed;
    }
    for (const [title, x, y, w, h, color] of example.groups) {
      const group = new LiteGraph.LGraphGroup(title);
      group.pos = [x, y]; group.size = [w, h]; group.color = color;
      app.graph.add(group);
    }
    const [x, y, w, h, text] = example.note;
    const note = LiteGraph.createNode('MarkdownNote');
    note.pos = [x, y]; note.title = 'About this workflow'; app.graph.add(note); note.setSize([w, h]);
    note.widgets[0].value = text;
    app.graph.setDirtyCanvas(true, true);
  }, { api: plain(example.nodes), example });
}

(async () => {
  const [port, folder, only] = process.argv.slice(2);
  const base = `http://127.0.0.1:${port}`;
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'chromium-'));
  const context = await chromium.launchPersistentContext(profile,
    { executablePath: '/usr/bin/chromium', headless: true, viewport: { width: 2200, height: 1290 }, args: FLAGS });
  const page = context.pages()[0] || await context.newPage();
  await fetch(`${base}/settings`, { method: 'POST', headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ 'Comfy.TutorialCompleted': true, 'Comfy.Minimap.Visible': false, 'Comfy.Graph.CanvasInfo': false }) });
  await page.goto(base, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app && window.app.graph && window.app.extensionManager, null, { timeout: 90000 });
  await page.waitForTimeout(4000);
  for (const [name, example] of Object.entries(EXAMPLES).filter(([name]) => !only || name === only)) {
    await layOut(page, example);
    await page.waitForTimeout(800);
    const json = await page.evaluate(() => window.app.graph.serialize());
    fs.writeFileSync(path.join(folder, name + '.json'), JSON.stringify(json, null, 1) + '\n');
    await page.evaluate((j) => window.app.loadGraphData(j), json);      // what a user will open
    const ids = async () => Object.keys(await (await fetch(`${base}/history`)).json());
    const before = new Set(await ids());
    await page.waitForTimeout(1000);
    await page.getByRole('button', { name: /^Run$/ }).first().click();
    for (const end = Date.now() + 180000; Date.now() < end && (await ids()).every((id) => before.has(id));) await page.waitForTimeout(300);
    const history = await (await fetch(`${base}/history`)).json();
    const done = Object.entries(history).find(([id]) => !before.has(id));
    console.log(name, done && done[1].status.status_str);
    await page.waitForTimeout(5000);      // the "Job completed" message goes
    await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView').catch(() => {}));
    await page.waitForTimeout(2500);
    const clip = await page.evaluate(() => {
      const { scale, offset } = window.app.canvas.ds, box = window.app.canvas.canvas.getBoundingClientRect();
      const items = [...window.app.graph.nodes, ...window.app.graph.groups];
      const left = Math.min(...items.map((i) => i.pos[0])) - 20, top = Math.min(...items.map((i) => i.pos[1])) - 50;
      const right = Math.max(...items.map((i) => i.pos[0] + i.size[0])) + 20, bottom = Math.max(...items.map((i) => i.pos[1] + i.size[1])) + 20;
      return { x: box.left + (left + offset[0]) * scale, y: box.top + (top + offset[1]) * scale, width: (right - left) * scale, height: (bottom - top) * scale };
    });
    await page.screenshot({ path: path.join(folder, name + '.jpg'), type: 'jpeg', quality: 82, clip });
  }
  await context.close(); fs.rmSync(profile, { recursive: true, force: true });
})().catch((e) => { console.error(e); process.exit(1); });
