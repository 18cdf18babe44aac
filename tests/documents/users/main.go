package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"
)

func number(name string) int {
	number, err := strconv.Atoi(os.Getenv(name))
	check(err)
	return number
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// Uses the snippets for pgx and database/sql. Prints the accounts that both have seen.
func main() {
	accounts, end := number("ACCOUNTS"), time.Now().Add(time.Duration(number("SECONDS"))*time.Second)
	ctx := context.Background()
	pool, err := openPool(ctx)
	check(err)
	db, err := openDB()
	check(err)
	byPool, byDB := map[string]bool{}, map[string]bool{}
	for (len(byPool) < accounts || len(byDB) < accounts) && time.Now().Before(end) {
		var one, other string
		check(pool.QueryRow(ctx, "SELECT current_user::text").Scan(&one))
		check(db.QueryRow("SELECT current_user::text").Scan(&other))
		byPool[one], byDB[other] = true, true
		time.Sleep(100 * time.Millisecond)
	}
	for name := range byPool {
		if byDB[name] {
			fmt.Print(name, " ")
		}
	}
	fmt.Println()
	if len(byPool) < accounts || len(byDB) < accounts {
		os.Exit(1)
	}
}
