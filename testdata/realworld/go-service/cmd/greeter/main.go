// SPDX-License-Identifier: Apache-2.0

// Command greeter serves a greeting over HTTP.
package main

import (
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"

	"example.test/greeter/greeting"
)

var version = "unset"

func main() {
	serve := flag.Bool("serve", false, "serve HTTP")
	check := flag.Bool("check", false, "check a running server")
	showVersion := flag.Bool("version", false, "print the version")
	flag.Parse()
	addr := os.Getenv("GREETER_ADDR")
	switch {
	case *showVersion:
		fmt.Println(version)
	case *check:
		if _, err := http.Get("http://127.0.0.1" + addr); err != nil {
			log.Fatal(err)
		}
	case *serve:
		log.Fatal(http.ListenAndServe(addr, greeting.Handler("/etc/greeter/message")))
	default:
		message, err := greeting.Read("/etc/greeter/message")
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(message)
	}
}
