// A pool of node-postgres as its documentation shows it: pool.js PORT DATABASE. Four workers, and five connections.
// A line of input ends it. It prints the numbers of transactions and of accounts; the first error ends it with 1.
const { Pool } = require("pg");

const [port, database] = process.argv.slice(2);
const pool = new Pool({ host: "127.0.0.1", port: Number(port), database, user: "app", max: 5 });
// An idle connection that the server ends is taken out of the pool.
pool.on("error", () => {});
const accounts = new Set();
let done = 0;
let stops = false;

async function worker() {
  while (!stops) {
    const client = await pool.connect();
    try {
      await client.query("BEGIN");
      const { rows } = await client.query("SELECT current_user, count(*) FROM things WHERE n > $1", [0]);
      accounts.add(rows[0].current_user);
      await client.query("SELECT pg_sleep(0.03)");
      await client.query("COMMIT");
    } finally {
      client.release();
    }
    done += 1;
    await new Promise((resolve) => setTimeout(resolve, 80));
  }
}

process.stdin.once("data", () => { stops = true; });
Promise.all([worker(), worker(), worker(), worker()]).then(
  () => { console.log(`${done} ${accounts.size}`); process.exit(0); },
  (error) => { console.error(error); process.exit(1); },
);
