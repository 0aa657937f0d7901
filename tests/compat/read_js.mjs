// transformers.js reads a bundle: one batch, padded on the left.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";

import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const NEW_TOKENS = 20;

const [bundle, variant] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(bundle);
const name = basename(bundle);

// The names of the bundle's variants are its own: fp32, q8, ...
const model = await AutoModelForCausalLM.from_pretrained(name, { device: "cpu", dtype: variant });
const tokenizer = await AutoTokenizer.from_pretrained(name);
tokenizer.padding_side = "left";
const prompts = JSON.parse(readFileSync(0, "utf-8"));
const texts = prompts.map((content) =>
  tokenizer.apply_chat_template([{ role: "user", content }], {
    add_generation_prompt: true,
    tokenize: false,
  }),
);
const inputs = tokenizer(texts, { add_special_tokens: false, padding: true });
const output = await model.generate({ ...inputs, do_sample: false, max_new_tokens: NEW_TOKENS });
const width = inputs.input_ids.dims[1];
console.log(JSON.stringify(output.tolist().map((row) => row.slice(width).map(Number))));
