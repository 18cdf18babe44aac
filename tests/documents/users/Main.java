import java.util.TreeSet;

/** Uses the snippet for HikariCP. Prints the accounts that it has seen. */
final class Main {
    public static void main(String[] arguments) throws Exception {
        var accounts = Integer.parseInt(System.getenv("ACCOUNTS"));
        var end = System.nanoTime() + Long.parseLong(System.getenv("SECONDS")) * 1_000_000_000L;
        var seen = new TreeSet<String>();
        try (var pool = Database.open()) {
            for (var turn = 0; seen.size() < accounts && System.nanoTime() < end; turn++) {
                try (var connection = pool.getConnection();
                        var rows = connection.createStatement().executeQuery("SELECT current_user")) {
                    rows.next();
                    seen.add(rows.getString(1));
                }
                // In place of the lifetime, which is 30 s or more: it ends the connections in the same way.
                if (turn % 10 == 0) {
                    pool.getHikariPoolMXBean().softEvictConnections();
                }
                Thread.sleep(100);
            }
        }
        System.out.println(String.join(" ", seen));
        System.exit(seen.size() >= accounts ? 0 : 1);
    }
}
