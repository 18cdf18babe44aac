// Validates Kubernetes objects, a JSON array on standard input, against the CRDs of KEDA, of the
// Prometheus Operator and of the Gateway API. Run in the directory that tools.sh prints. Objects of other kinds are left alone.
import { pathToFileURL } from "node:url";
import { readFileSync } from "node:fs";

const packages = { "keda.sh": "keda", "monitoring.coreos.com": "prometheus-operator", "gateway.networking.k8s.io": "gateway-api" };
let checked = 0;
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const found = packages[object.apiVersion.split("/")[0]];
  if (!found) continue;
  const file = `${process.cwd()}/node_modules/@kubernetes-models/${found}/${object.apiVersion}/${object.kind}.js`;
  const model = (await import(pathToFileURL(file)))[object.kind];
  new model(object).validate();
  checked += 1;
}
console.log(checked);
