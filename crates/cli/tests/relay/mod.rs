//! Between the command and a server: passes requests on, answers them itself, holds them, or cuts an answer.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// It passes.
    Pass,
    /// It is answered here, and never arrives.
    Answer(u16, &'static str),
    /// It never arrives, and is never answered.
    Hold,
    /// It arrives, and the answer is lost.
    HoldAnswer,
    /// The connection closes after the first piece of the answer's body.
    Cut,
}

/// What is done to a request by its path and how many of that path came before.
type Rule = dyn Fn(&str, usize) -> Act + Send + Sync;

pub struct Relay {
    pub address: String,
    /// Paths of the requests that did not pass.
    hits: mpsc::Receiver<String>,
}

impl Relay {
    pub fn start(server: &str, rule: impl Fn(&str, usize) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (told, hits) = mpsc::channel();
        let (server, rule): (String, Arc<Rule>) = (server.to_string(), Arc::new(rule));
        let counts = Arc::new(Mutex::new(BTreeMap::new()));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let upstream = TcpStream::connect(&server).unwrap();
                let (rule, counts, told) = (rule.clone(), counts.clone(), told.clone());
                thread::spawn(move || relay(client, upstream, &*rule, &counts, &told));
            }
        });
        Self { address, hits }
    }

    /// Waits until a request did not pass, and gives its path.
    pub fn hit(&self) -> String {
        self.hits.recv_timeout(Duration::from_secs(60)).expect("the request comes")
    }
}

const PASS: u8 = 0;
const MUTE: u8 = 1;
const CUT: u8 = 2;

fn relay(
    mut client: TcpStream,
    mut upstream: TcpStream,
    rule: &Rule,
    counts: &Mutex<BTreeMap<String, usize>>,
    told: &mpsc::Sender<String>,
) {
    let mode = Arc::new(AtomicU8::new(PASS));
    let (from, to, seen) = (upstream.try_clone().unwrap(), client.try_clone().unwrap(), mode.clone());
    thread::spawn(move || copy_answers(from, to, &seen));
    while let Some((path, request)) = read_request(&mut client) {
        let number = {
            let mut counts = counts.lock().unwrap();
            let count = counts.entry(path.clone()).or_insert(0);
            *count += 1;
            *count - 1
        };
        let act = rule(&path, number);
        if !matches!(act, Act::Pass) {
            let _ = told.send(path);
        }
        match act {
            Act::Hold => continue,
            Act::Answer(status, body) => {
                let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                let _ = client.write_all(head.as_bytes());
                continue;
            }
            Act::HoldAnswer => mode.store(MUTE, Ordering::SeqCst),
            Act::Cut => mode.store(CUT, Ordering::SeqCst),
            Act::Pass => {}
        }
        if upstream.write_all(&request).is_err() {
            break;
        }
    }
    // The server sees its client go.
    let _ = upstream.shutdown(Shutdown::Both);
}

fn copy_answers(mut from: TcpStream, mut to: TcpStream, mode: &AtomicU8) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count) = from.read(&mut buffer) {
        let mode = mode.load(Ordering::SeqCst);
        let piece = &buffer[..count];
        // A head alone is no body yet; of the body's first piece half is passed.
        let head = piece.windows(4).position(|w| w == b"\r\n\r\n").filter(|_| piece.starts_with(b"HTTP/"));
        let body = head.map_or(0, |at| at + 4);
        let cut = mode == CUT && body < count;
        let piece = if cut { &piece[..body + (count - body) / 2] } else { piece };
        if count == 0 || mode != MUTE && to.write_all(piece).is_err() || cut {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

/// Path and bytes of the next request.
fn read_request(client: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let (mut request, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        if let Some(end) = request.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&request[..end]).into_owned();
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
            });
            if request.len() >= end + 4 + length.unwrap_or(0) {
                let target = head.split(' ').nth(1)?;
                return Some((target.split('?').next()?.to_string(), request));
            }
        }
        match client.read(&mut buffer) {
            Ok(count) if count > 0 => request.extend_from_slice(&buffer[..count]),
            _ => return None,
        }
    }
}
