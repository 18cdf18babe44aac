// Counts what a busy pool of node-postgres loses behind a proxy: pauses.js PORT DATABASE PAUSE_MS SECONDS. Four workers,
// and five connections. A worker pauses after each transaction; with -1 it does not. Needs a table `things (n int)`.
const { Pool } = require("pg");

const [port, database, ...numbers] = process.argv.slice(2);
const [pause, seconds] = numbers.map(Number);
const pool = new Pool({ host: "127.0.0.1", port: Number(port), database, user: "app", max: 5 });
pool.on("error", () => {});
const stop = Date.now() + seconds * 1000;
const accounts = new Set();
// An error at a connection that a worker has: without a listener node ends the program.
const seen = { pause, transactions: 0, failed: 0, errorEvents: 0 };
const onError = () => { seen.errorEvents += 1; };

async function transaction(client) {
  await client.query("BEGIN");
  const { rows } = await client.query("SELECT current_user, count(*) FROM things WHERE n > $1", [0]);
  accounts.add(rows[0].current_user);
  await client.query("SELECT pg_sleep(0.03)");
  await client.query("COMMIT");
}

async function worker() {
  while (Date.now() < stop) {
    const client = await pool.connect();
    client.on("error", onError);
    try {
      await transaction(client);
      seen.transactions += 1;
    } catch {
      seen.failed += 1;
    } finally {
      client.removeListener("error", onError);
      client.release();
    }
    if (pause >= 0) await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

Promise.all([worker(), worker(), worker(), worker()]).then(() => {
  console.log(JSON.stringify({ ...seen, accounts: accounts.size }));
  process.exit(0);
});
