//! The page at `/` in headless Chromium, driven over WebDriver (W3C). It needs Debian's `chromium` and
//! `chromium-driver`: `cargo test -p bitfast-server --test browser -- --ignored`.

mod common;

use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Client, Running, http, tiny};
use serde_json::{Value, json};

/// A browser with one page.
struct Browser {
    driver: Child,
    client: Client,
    session: String,
    /// Where it and its profiles leave files.
    _scratch: tempfile::TempDir,
    /// A driver whose output nobody could read any more would end.
    _told: Lines<BufReader<ChildStdout>>,
}

impl Browser {
    fn start() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let mut driver = Command::new("chromedriver")
            .args(["--port=0", "--log-level=SEVERE"])
            .env("TMPDIR", scratch.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("chromedriver starts");
        let mut told = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = told
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| {
                line.split_once("successfully on port ")?.1.trim_end_matches('.').parse::<u16>().ok()
            })
            .expect("chromedriver tells its port");
        let mut browser = Self {
            driver,
            client: Client { address: ([127, 0, 0, 1], port).into() },
            session: String::new(),
            _scratch: scratch,
            _told: told,
        };
        let options =
            json!({ "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] });
        let wanted = json!({ "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" } });
        let made = browser.call("POST", "/session", &json!({ "capabilities": { "alwaysMatch": wanted } }));
        browser.session = format!("/session/{}", made["sessionId"].as_str().expect("a session"));
        browser
    }

    /// Sends a command; panics with the driver's words when it fails.
    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let (path, body) = (format!("{}{path}", self.session), body.to_string());
        let mut stream = self.client.connect();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        write!(
            stream,
            "{head}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut reader = BufReader::new(stream);
        let (status, headers) = http::read_head(&mut reader);
        let length = headers.iter().find(|(k, _)| k.eq_ignore_ascii_case("content-length")).unwrap();
        let mut answer = vec![0; length.1.parse().unwrap()];
        reader.read_exact(&mut answer).unwrap();
        let mut answer: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(status, 200, "{path}: {answer}");
        answer["value"].take()
    }

    fn open(&self, server: &Running) {
        self.call("POST", "/url", &json!({ "url": format!("http://{}/", server.client.address) }));
    }

    /// The value of a script's `return`.
    fn js(&self, script: &str) -> Value {
        self.call("POST", "/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// What an element shows.
    fn text(&self, id: &str) -> String {
        self.js(&format!("return document.getElementById('{id}').innerText")).as_str().unwrap().to_owned()
    }

    #[track_caller]
    fn until(&self, condition: &str) {
        let start = Instant::now();
        while self.js(&format!("return Boolean({condition})")) != true {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "never: {condition}\n{}",
                self.js("return document.body.innerText")
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn devtools(&self, command: &str, params: &Value) {
        self.call("POST", "/goog/cdp/execute", &json!({ "cmd": command, "params": params }));
    }

    /// Errors on the console since the last look.
    fn errors(&self) -> Vec<Value> {
        let log = self.call("POST", "/se/log", &json!({ "type": "browser" }));
        log.as_array().unwrap().iter().filter(|line| line["level"] == "SEVERE").cloned().collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser, which would outlive its driver. A test that fails already is not to fail twice.
        if let Ok(mut stream) = TcpStream::connect(self.client.address) {
            let head =
                format!("DELETE {} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", self.session);
            let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.read(&mut [0; 512]).map(drop));
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

const STATE_IS: &str = "document.getElementById('state').innerText ===";

/// Contrast ratio (WCAG 2.2) of the palette's texts on the surfaces that they stand on; the worst.
const WORST_CONTRAST: &str = "
    const style = getComputedStyle(document.documentElement);
    const light = (name) => {
        const hex = style.getPropertyValue('--' + name).trim();
        const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const pairs = [['text', 'page'], ['text', 'card'], ['dim', 'page'], ['dim', 'card'], ['accent', 'card'],
        ['on-accent', 'accent'], ['good', 'good-fill'], ['warn', 'warn-fill'], ['bad', 'bad-fill']];
    return Math.min(...pairs.map(([a, b]) => {
        const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    }));";

#[test]
#[ignore = "drives Chromium; .ci/run installs it and runs it"]
fn the_page_shows_what_runs_and_proves_the_law() {
    let server = Running::start(tiny(|args| args.seed = Some(1)), |_| ());
    let browser = Browser::start();
    browser.open(&server);
    browser.until(&format!("{STATE_IS} 'Serving'"));
    let config = server.client.get("/debug/config").ok();
    assert_eq!(browser.text("fingerprint"), config["fingerprint"]);
    assert_eq!(browser.text("model"), "tiny-llama");
    assert_eq!((browser.text("out-total"), browser.text("ttft")), ("0".to_owned(), "–".to_owned()));
    for (text, hash) in [
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
    ] {
        assert_eq!(browser.js(&format!("return sha256('{text}')")), hash);
    }

    browser.js("document.getElementById('crowd').value = 7; document.getElementById('ask').click()");
    browser.until("document.querySelector('#verdict.same, #verdict.differs')");
    let digests =
        browser.js("return [...document.querySelectorAll('#verdict dd')].map((d) => d.textContent)");
    assert!(browser.text("verdict").starts_with("Equal: 24 tokens"), "{}", browser.text("verdict"));
    assert_eq!(digests[0], digests[1]);
    assert_eq!(digests[0].as_str().unwrap().len(), 64);
    // Two needles and a crowd of seven.
    browser.until("document.querySelectorAll('#recent tbody tr').length === 9");
    browser.until("document.getElementById('ttft').innerText !== '–'");
    assert_eq!(browser.text("out-total"), (2 * 24 + 7 * 48).to_string());
    browser.until("document.querySelector('#rate-chart .stroke').getAttribute('d').length > 20");

    // A needle whose answers differ is told apart.
    browser.js("let n = 0; digest = () => String(n++); document.getElementById('ask').click()");
    browser.until("document.querySelector('#verdict.differs')");
    assert!(browser.text("verdict").starts_with("Different"), "{}", browser.text("verdict"));
    assert_eq!(browser.errors(), Vec::<Value>::new());

    server.client.post("/debug/sleep?level=0", &json!({})).ok();
    browser.until(&format!("{STATE_IS} 'Paused'"));
    server.client.post("/debug/sleep?level=2", &json!({})).ok();
    browser.until(&format!("{STATE_IS} 'Asleep, level 2'"));
    server.client.post("/debug/wake_up", &json!({})).ok();
    browser.until(&format!("{STATE_IS} 'Serving'"));
    drop(server);
    browser.until(&format!("{STATE_IS} 'Unreachable'"));
}

#[test]
#[ignore = "drives Chromium; .ci/run installs it and runs it"]
fn the_page_fits_phones_and_both_colour_schemes() {
    let server = Running::start(tiny(|_| ()), |_| ());
    server.client.post("/v1/completions", &json!({ "prompt": "hello", "max_tokens": 3 })).ok();
    let browser = Browser::start();
    browser.open(&server);
    browser.until("document.querySelectorAll('#recent tbody tr').length === 1");
    let mut pages = Vec::new();
    for scheme in ["light", "dark"] {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        browser.devtools("Emulation.setEmulatedMedia", &json!({ "features": [feature] }));
        pages.push(browser.js("return getComputedStyle(document.body).backgroundColor"));
        let worst = browser.js(WORST_CONTRAST).as_f64().unwrap();
        assert!(worst >= 4.5, "{scheme}: a contrast of {worst}");
        for width in [320, 390, 768, 1280] {
            let size =
                json!({ "width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500 });
            browser.devtools("Emulation.setDeviceMetricsOverride", &size);
            let over = browser.js(
                "return [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg') \
                 && e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))",
            );
            assert_eq!(over, json!([]), "{scheme}, {width} px");
            let wide = browser.js("return document.documentElement.scrollWidth").as_u64().unwrap();
            assert!(wide <= width, "{scheme}: the page is {wide} px wide on {width}");
        }
    }
    assert_ne!(pages[0], pages[1]);
    assert_eq!(browser.errors(), Vec::<Value>::new());
}

#[test]
#[ignore = "drives Chromium; .ci/run installs it and runs it"]
fn the_page_asks_for_the_key_where_there_is_one() {
    let server = Running::start(tiny(|_| ()), |config| config.api_keys = vec!["open sesame".to_owned()]);
    let browser = Browser::start();
    browser.open(&server);
    browser.until(&format!("{STATE_IS} 'Locked'"));
    assert_eq!(browser.js("return getComputedStyle(document.getElementById('live')).display"), "none");
    let enter = |key: &str| {
        browser.js(&format!(
            "document.getElementById('key').value = '{key}'; document.querySelector('#key-form button').click()"
        ))
    };
    enter("wrong");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(browser.text("state"), "Locked");
    enter("open sesame");
    browser.until(&format!("{STATE_IS} 'Serving'"));
    assert!(!browser.text("fingerprint").is_empty());
}
